"""Architectures that packs of rows would be wrong for, by their configuration alone (W025).

What is not listed here and was not tried proves itself when it is loaded (models/architecture.py).
"""

from typing import Any

from rlhfctl.preflight.finding import Finding

STATE = "a state of its layers runs along the sequence, from one row of a pack into the next"
OWN_CODE = "its attention is computed by code of its own, which mixes the rows of a pack"
TERMS = "its attention has terms that are not computed here ({})"

# fmt: off
STATEFUL = [
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "minimax", "nemotron_h", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv",
    "xlstm", "zamba", "zamba2",
]
# fmt: on
BY_THEMSELVES = [
    "bloom",
    "codegen",
    "falcon",
    "gpt_neo",
    "gptj",
    "mpt",
    "stablelm",
    "xglm",
]
UNSUPPORTED = {
    **dict.fromkeys(STATEFUL, STATE),
    **dict.fromkeys(BY_THEMSELVES, OWN_CODE),
    "gemma2": TERMS.format("logits that are capped softly"),
    "gpt_oss": TERMS.format("sinks"),
}
SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping")
DEFAULT_SCALES = {("cohere", "logit_scale"): 0.0625, ("cohere2", "logit_scale"): 0.0625}
APART = {"full_attention", "sliding_attention", "chunked_attention"}


def unsupported(config: dict[str, Any]) -> tuple[str, str] | None:
    """(type, reason), or None: nothing is known against it. config: of config.json; of a model that reads more than
    text its text part counts."""
    text = config.get("text_config")
    part = text if isinstance(text, dict) else config
    kind = str(part.get("model_type") or config.get("model_type"))
    if kind in UNSUPPORTED:
        return kind, UNSUPPORTED[kind]
    kinds = part.get("layer_types")
    others = sorted({str(each) for each in kinds} - APART) if isinstance(kinds, list) else []
    return (kind, f"it has layers of {', '.join(others)}: {STATE}") if others else None


def scaled(config: dict[str, Any]) -> tuple[str, str] | None:
    """The same for a language model: what its configuration makes of the logits."""
    text = config.get("text_config")
    part = text if isinstance(text, dict) else config
    kind = str(part.get("model_type") or config.get("model_type"))
    given = {key: part.get(key, DEFAULT_SCALES.get((kind, key))) for key in SCALES}
    named = [f"{key} {value}" for key, value in given.items() if value not in (None, 1)]
    if not named:
        return None
    return (
        kind,
        f"its logits are scaled or capped behind the last matrix ({', '.join(named)}), which is not computed here",
    )


def check_architecture(key: str, path: str, config: dict[str, Any], head: bool) -> list[Finding]:
    """head: whether its logits are used, a language model's."""
    found = unsupported(config) or (scaled(config) if head else None)
    if found is None:
        return []
    kind, reason = found
    return [
        Finding(
            "W025",
            "error",
            f"{key}: models of type {kind} are not supported",
            f"{path}: {reason}",
            fix=f"set {key} to a model of another family: docs/preflight.md lists those that were tried",
        )
    ]
