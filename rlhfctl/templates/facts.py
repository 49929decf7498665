"""What the report says about one side apart from findings."""

import hashlib
from contextlib import suppress
from typing import Any

from rlhfctl.templates.checks.tokens import CannotEncode, encode
from rlhfctl.templates.checks.tokens import facts as token_facts
from rlhfctl.templates.probe import Probe
from rlhfctl.templates.sides import Side


def side_facts(probe: Probe) -> dict[str, Any]:
    """Field names are stable: they are part of the JSON report."""
    side = probe.side
    template = side.template
    return {
        "name": side.name,
        "path": str(side.path) if side.path is not None else None,
        "template_source": side.source or None,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        "tokens": {key: value for key, value in side.tokens.items() if value is not None},
        "eot": probe.eot,
        "adds_bos": side.adds_bos,
        "generation_eos_ids": list(side.generation_eos) if side.generation_eos is not None else None,
        "template_kwargs": side.template_kwargs,
        "generation_prompt": probe.generation_prompt,
        "cue": probe.cue,
        "user_header": probe.user_header,
        "terminator": probe.terminator,
        "after_final": probe.after_final,
        "preamble": probe.preamble,
        "content": "list" if probe.wrap else "string",
        **token_facts(probe),
        **({"note": side.note} if side.note else {}),
    }


def render_markers(side: Side) -> list[str]:
    """Strings that are special tokens of the side."""
    declared = [token for token in (*side.tokens.values(), side.eot) if token]
    if side.tokenizer is not None:
        declared += [t.content for t in side.tokenizer.get_added_tokens_decoder().values() if t.special]
    return list(dict.fromkeys(declared))


def token_counts(policy: Side, rm: Side | None, renders: dict[str, str | None]) -> dict[str, dict[str, int]]:
    """Tokens of each render in each vocabulary at hand."""
    names = {"policy": policy, "reward model": rm}
    tokenizers = {
        name: side.tokenizer
        for name, side in names.items()
        if side is not None and side.tokenizer is not None
    }
    result: dict[str, dict[str, int]] = {}
    for name, text in (("policy", renders["policy"]), ("reward model", renders["rm"])):
        if text is not None:
            result[name] = {}
            for of, tokenizer in tokenizers.items():
                with suppress(CannotEncode):
                    result[name][of] = len(encode(tokenizer, text))
    return result
