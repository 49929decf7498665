"""Architectures: those that packs of rows were tried to be right for, and those that they would be wrong for.

What is in neither list proves itself when it is loaded (models/architecture.py).
"""

from typing import Any

# fmt: off
TRIED = frozenset([
    "bitnet", "cohere", "cohere2", "diffllama", "doge", "exaone4", "gemma", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "opt",
    "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
])
# fmt: on
STATE = "a state of its layers runs along the sequence, from one row of a pack into the next"
OWN_CODE = "its attention is computed by code of its own, which mixes the rows of a pack"
TERMS = "its attention has terms that are not computed here ({})"

# fmt: off
STATEFUL = [
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba", "mamba2",
    "minimax", "nemotron_h", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv",
    "xlstm", "zamba", "zamba2",
]
BY_THEMSELVES = ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "stablelm", "xglm"]
# fmt: on
UNSUPPORTED = {
    **dict.fromkeys(STATEFUL, STATE),
    **dict.fromkeys(BY_THEMSELVES, OWN_CODE),
    "gemma2": TERMS.format("logits that are capped softly"),
    "gpt_oss": TERMS.format("sinks"),
}
# Keys of configurations: what becomes of x W^T.
SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping")
DEFAULT_SCALES = {("cohere", "logit_scale"): 0.0625, ("cohere2", "logit_scale"): 0.0625}
PLAIN = frozenset({"full_attention", "sliding_attention"})  # of layer_types
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
LENGTHENED = ("longrope", "su")  # ropes that turn by other factors from a length on, "su" in older files


def text_part(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(model_type, the part of the configuration that describes what reads text)."""
    text = config.get("text_config")
    part = text if isinstance(text, dict) else config
    return str(part.get("model_type") or config.get("model_type")), part


def unsupported(config: dict[str, Any]) -> tuple[str, str] | None:
    """(type, reason), or None: nothing is known against it. config: of config.json; of a model that reads more than
    text its text part counts."""
    kind, part = text_part(config)
    if kind in UNSUPPORTED:
        return kind, UNSUPPORTED[kind]
    kinds = part.get("layer_types")
    others = sorted({str(each) for each in kinds} - PLAIN) if isinstance(kinds, list) else []
    if not others:
        return None
    return kind, f"it has layers of {', '.join(others)}, which are not computed in packs"


def scaled(config: dict[str, Any]) -> tuple[str, str] | None:
    """The same for a language model: what its configuration makes of the logits."""
    kind, part = text_part(config)
    given = {key: part.get(key, DEFAULT_SCALES.get((kind, key))) for key in SCALES}
    named = ", ".join(f"{key} {value}" for key, value in given.items() if value not in (None, 1))
    if not named:
        return None
    return kind, f"its logits are scaled or capped behind the last matrix ({named}), not computed here"


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens that the model's positions reach; None where no key tells."""
    for holder in (config, text_part(config)[1]):
        for key in CONTEXT_KEYS:
            if isinstance(holder.get(key), int):
                return int(holder[key])
    return None


def longest_row(config: dict[str, Any]) -> int | None:
    """Tokens that a row may have: the model's context, or what longrope (Phi-3 with 128k) reads by its short factors.

    One longer row has all rows of its pack or batch turned by the long factors, and an answer that grows past that
    length has keys of both: what is computed of a row would depend on the others."""
    context, part = context_length(config), text_part(config)[1]
    rope = part.get("rope_parameters") or part.get("rope_scaling")
    if not isinstance(rope, dict) or (rope.get("rope_type") or rope.get("type")) not in LENGTHENED:
        return context
    short = rope.get("original_max_position_embeddings") or part.get("original_max_position_embeddings")
    return min(short, context or short) if isinstance(short, int) else context
