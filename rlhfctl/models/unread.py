"""Weights of a checkpoint that its own configuration has no place for: the model would be another one than was saved.

transformers leaves them out: layers beyond num_hidden_layers, biases and norms that the configuration does not have,
the scales of matrices in 8 bits, an adapter that was never merged. What stands beside the model is none of this: a head
of another task, another tower, layers that predict further tokens.
"""

import re
from typing import Any

from torch import nn

from rlhfctl.errors import Refused

# Computed, not trained; older versions of transformers wrote them.
COMPUTED = re.compile(r"(\binv_freq|\bmasked_bias|\b(attn|attention)\.bias|\bposition_ids)$")
LAYER = re.compile(r"\blayers\.(\d+)\.")


def refuse_unread(path: str, model: nn.Module, report: dict[str, Any]) -> None:
    """report: of from_pretrained, whose unexpected_keys these are."""
    config: Any = model.config
    if getattr(config, "quantization_config", None) is not None:
        return  # what its scales are called is for the library that reads them
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    text = config.get_text_config()
    further = text.num_hidden_layers if getattr(text, "num_nextn_predict_layers", None) else None
    unread = [
        name
        for name in sorted(map(str, report.get("unexpected_keys") or ()))
        if not COMPUTED.search(name)
        and belongs(name, modules, prefix)
        and not (further is not None and (at := LAYER.search(name)) and int(at.group(1)) >= further)
    ]
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise Refused(
            f"the checkpoint {path} holds {', '.join(unread[:3])}{more}, for which its config.json has no place: the "
            "model would be computed without them; use the config.json that was saved with these weights"
        )


def belongs(name: str, modules: dict[str, nn.Module], prefix: str) -> bool:
    """Whether a weight is part of the model: of one of its layers or of a module that has weights.

    A trunk's own names lack the prefix of a checkpoint with a head."""
    plain = name.removeprefix(f"{prefix}.") if prefix and prefix not in modules else name
    parts = plain.split(".")
    holder = next(
        (at for size in range(len(parts) - 1, 0, -1) if (at := ".".join(parts[:size])) in modules), ""
    )
    module = modules[holder]
    listed = isinstance(module, nn.ModuleList) or any(part.isdigit() for part in holder.split("."))
    return listed or any(True for _ in module.parameters(recurse=False))
