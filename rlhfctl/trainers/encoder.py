"""The policy's chat template over its tokenizer, for the worker."""

from rlhfctl.recipe.sections import Policy
from rlhfctl.templates.encode import ChatEncoder


def load_encoder(policy: Policy) -> ChatEncoder:
    path = policy.tokenizer or policy.path
    assert path is not None  # the schema refuses a policy without either
    return ChatEncoder.from_path(path, chat_template=policy.chat_template, template_kwargs=policy.template_kwargs)
