"""What the recipe allows to be done to messages, where a remote model's template needs it (as the bridge does it)."""

from collections.abc import Callable, Sequence

from jinja2 import TemplateError

from rlhfctl.recipe.sections import Template
from rlhfctl.serving.protocol import Info, TemplateInfo
from rlhfctl.templates.adapt import fold_system, merge_roles
from rlhfctl.templates.probe import S1, U1, U2, assistant, system, user
from rlhfctl.templates.render import Message, render

Adapter = Callable[[Sequence[Message]], list[Message]]


def adapters(info: Info, template: Template | None) -> list[Adapter]:
    """Found out once, by rendering with the template that the handshake gave."""
    if template is None or info.template is None:
        return []
    found: list[Adapter] = []
    if template.fold_system and not holds(info.template, [system(), user(), assistant()], S1):
        found.append(fold_system)
    if template.merge_roles and not holds(info.template, [user(), user(U2), assistant()], U1):
        found.append(merge_roles)
    return found


def holds(shown: TemplateInfo, messages: Sequence[Message], word: str) -> bool:
    """Whether the template takes the messages, and the word is in what it makes of them."""
    try:
        return word in render(shown.text, messages, shown.tokens)
    except TemplateError:
        return False
