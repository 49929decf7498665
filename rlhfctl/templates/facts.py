"""What the report says about one side apart from findings."""

import hashlib
from typing import Any

from rlhfctl.templates.checks.tokens import facts as token_facts
from rlhfctl.templates.probe import Probe


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
    }
