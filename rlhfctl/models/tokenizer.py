"""A model's chat template over its tokenizer, as transformers loads it: what every heavy process encodes with."""

from collections.abc import Callable
from typing import Any

from rlhfctl.recipe.sections import Policy
from rlhfctl.templates.encode import ChatEncoder, load_side

PROBES = (
    "Hello world, it's 12+30=42.",
    "  two\n\n  spaces\tand tabs",
    "def f(x):\n    return x**2  # naïve",
    "日本語 ok",
)


def load_encoder(
    path: str,
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ChatEncoder:
    """Ids are those of AutoTokenizer, because that is how models are trained and served elsewhere.

    transformers lets the tokenizer's class override tokenizer.json; where the two give other ids, that is said (K014).
    """
    from transformers import AutoTokenizer

    light = ChatEncoder.from_side(load_side(path, chat_template, template_kwargs or {}))
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    encoder = ChatEncoder(
        light.template,
        light.tokens,
        tokenizer.backend_tokenizer,
        template_kwargs,
        stop_ids=light.stop_ids,
        pad_id=light.pad_id,
    )
    different = [probe for probe in PROBES if ids_of(encoder, probe) != ids_of(light, probe)]
    if different:
        say(
            f"warning: {path}: {type(tokenizer).__name__} gives other ids than tokenizer.json (K014, first for "
            f"{different[0]!r}); {type(tokenizer).__name__}'s are used, as transformers and vLLM will"
        )
    return encoder


def policy_encoder(policy: Policy, say: Callable[[str], None]) -> ChatEncoder:
    path = policy.tokenizer or policy.path
    assert path is not None  # the schema refuses a policy without either
    return load_encoder(path, policy.chat_template, policy.template_kwargs, policy.trust_remote_code, say)


def ids_of(encoder: ChatEncoder, text: str) -> list[int] | None:
    """None where the vocabulary cannot express the text (a closed one without an unknown token)."""
    try:
        return encoder.encode_text(text)
    except Exception:  # the binding raises bare Exception
        return None
