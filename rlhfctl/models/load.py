"""Load a causal language model so that nothing in it is random unless the recipe says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlhfctl.errors import Refused
from rlhfctl.models import attention
from rlhfctl.models.adapter_base import checked_base, is_adapter
from rlhfctl.models.architecture import built, prove, prove_logits
from rlhfctl.models.direct_gradient import look_up_directly
from rlhfctl.models.gated import write_out_units
from rlhfctl.models.last_layer import reading
from rlhfctl.models.linear import shape_bucket, speed_up
from rlhfctl.models.lora import announce_quantized
from rlhfctl.models.norm import write_out_norms
from rlhfctl.models.packing import Pack
from rlhfctl.models.quantize import is_quantized, quantize
from rlhfctl.models.rotary import write_out_rotation
from rlhfctl.models.unread import refuse_unread
from rlhfctl.recipe.sections import Policy


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_causal_lm(policy: Policy, device: torch.device, seed: int) -> nn.Module:
    """The policy's weights in the recipe's dtype on `device`, attention through models/attention.py; the backbone's
    matrices in 8 or 4 bits where the recipe says so (models/quantize.py).

    Raises Refused when the checkpoint does not hold every weight of the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    if policy.path is not None and is_adapter(policy.path):
        return load_adapted(policy, device, seed)
    dtype = resolve_dtype(policy.dtype, device)
    options: dict[str, Any] = {
        "attn_implementation": attention.NAME,
        "trust_remote_code": policy.trust_remote_code,
    }
    if policy.from_config is not None:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(policy.from_config, trust_remote_code=policy.trust_remote_code)
        # Drawn in float32 and rounded, so that both dtypes start from the same model.
        with built(policy.from_config):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        round_parameters(model, dtype)
    else:
        safe_weights(str(policy.path))
        with built(str(policy.path)):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(policy.path), dtype=dtype, output_loading_info=True, use_safetensors=True, **options
            )
        model, report = loaded
        refuse_incomplete(str(policy.path), report)
        refuse_unread(str(policy.path), model, report)
    if policy.quantization != "none":
        quantize(backbone(model), policy.quantization, policy.quantization_block, device)
        leave_file(model)
    model = prepare(model, device, policy.gradient_checkpointing)
    prove_logits(model, backbone(model), head_weight(model))
    return model


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone, as from_pretrained does: the frequencies of rotary positions are a buffer and stay in float32,
    or the model would be another one than its own checkpoint once that is loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def leave_file(model: nn.Module) -> None:
    """Copies of what was not quantised: a tensor that is a view of the checkpoint's file keeps all of it in memory, in
    full precision."""
    for module in model.modules():
        held = [
            tensor
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        for tensor in held:
            if not is_quantized(module) or tensor is module.bias:
                tensor.data = tensor.data.clone()


def load_adapted(policy: Policy, device: torch.device, seed: int) -> nn.Module:
    """policy.path is an adapter: its base in the bits that it was trained over, and the adapter acting on it.

    Raises Refused for a base whose weights have changed, or an adapter that does not fit it.
    """
    from peft import LoraConfig

    from rlhfctl.models.export import load_trainable

    directory = Path(str(policy.path))
    base, facts = checked_base(directory)
    kept = {name: facts[name] for name in ("quantization", "quantization_block") if name in facts}
    model = load_causal_lm(policy.model_copy(update={"path": str(base)} | kept), device, seed)
    announce_quantized(model)
    model.add_adapter(LoraConfig.from_pretrained(str(directory)))  # type: ignore[operator]
    load_trainable(model, directory)
    return model.requires_grad_(False).eval()


@contextmanager
def own_words() -> Iterator[None]:
    """Inside: no table of missing and unexpected weights from transformers; the caller says what matters."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_classifier(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A checkpoint as a sequence classifier of one label, and what loading it found: missing_keys, mismatched_keys.

    Keys of another shape are left out of it, for the value-head rule to replace."""
    from transformers import AutoModelForSequenceClassification

    with own_words(), built(str(path)):
        return AutoModelForSequenceClassification.from_pretrained(
            str(path),
            num_labels=1,
            dtype=dtype,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **options,
        )


def safe_weights(path: str) -> None:
    """Raises Refused for a directory whose weights are pickles alone: reading one can run any code; for one without
    weights, or with a file that is cut.

    For a model on the hub use_safetensors says the same to transformers."""
    directory = Path(path)
    if not directory.is_dir():
        return
    files = sorted(directory.glob("*.safetensors"))
    pickles = [file.name for form in ("*.bin", "*.pt", "*.pth") for file in sorted(directory.glob(form))]
    if pickles and not files:
        raise Refused(
            f"{path} holds its weights as pickles alone ({pickles[0]}), and none is read, for it can run any code: "
            "convert it to safetensors where you trust it"
        )
    if not files:
        raise Refused(
            f"{path} holds no weights (*.safetensors): give a directory that a run or a download wrote"
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise Refused(
                f"the weights of {path} are damaged ({file.name}: {error}): copy or download them again"
            ) from None


def refuse_incomplete(path: str, report: dict[str, Any]) -> None:
    """transformers fills weights that a checkpoint lacks, or whose shape differs, with random numbers."""
    missing = sorted(report.get("missing_keys", ()))
    wrong = sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys", ())
    )
    if missing or wrong:
        what = "lacks" if missing else "holds with another shape"
        names = (missing or wrong)[:3]
        more = f" and {len(missing or wrong) - 3} more" if len(missing or wrong) > 3 else ""
        raise Refused(
            f"the checkpoint {path} {what} {', '.join(names)}{more}: these weights would be random; "
            "use a complete checkpoint, or policy.from_config to train from random weights on purpose"
        )


def prepare(model: nn.Module, device: torch.device, gradient_checkpointing: bool = False) -> nn.Module:
    """Move to the device and take out what makes training differ from what was sampled."""
    model = model.to(device)
    without_dropout(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # a sampled pad token is a token: its embedding gets its gradient
    speed_up(model)
    look_up_directly(model)
    write_out_norms(model)
    write_out_units(model)
    write_out_rotation(model)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
    prove(backbone(model))  # in the mode that it trains in
    return model


def without_dropout(model: nn.Module) -> None:
    """Ratios between policies must not compare dropout masks. Checkpointing needs the mode of training, in which some
    families drop by a number of their own (OPT: also whole layers; Starcoder2) and not by an nn.Dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or name == "jitter_noise"):
                setattr(module, name, 0.0)
    if hasattr(model.config, "attention_dropout"):
        config_of(model).attention_dropout = 0.0


def config_of(model: nn.Module) -> Any:
    """The model's configuration, which nn.Module does not know of."""
    return model.config


def backbone(model: nn.Module) -> nn.Module:
    """The transformer without its language-model head."""
    return model.base_model  # type: ignore[return-value]


def head_weight(model: nn.Module) -> Tensor:
    """The output matrix [V, H]. Raises Refused for heads that are more than one matrix."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise Refused(
            f"{type(model).__name__} has a language-model head that is not one matrix without bias: not supported"
        )
    return head.weight


def hidden_at_predictors(trunk: nn.Module, pack: Pack) -> Tensor:
    """Last hidden states [N, H] of the positions that predict the pack's trained tokens."""
    weight = next(trunk.parameters())
    bucket = shape_bucket(weight.dtype, weight.device)
    with reading(trunk, pack.read, pack.ids.shape[1], bucket):
        out = trunk(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, layout=pack.layout)
    return out.last_hidden_state[0].index_select(0, pack.predictors)


def load_trunk(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A checkpoint's transformer without any head. Raises Refused when weights are missing."""
    from transformers import AutoModel

    attention.register()
    safe_weights(path)
    with own_words(), built(path):
        loaded: Any = AutoModel.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
        )
    trunk, report = loaded
    refuse_incomplete(path, report)
    refuse_unread(path, trunk, report)
    return prepare(trunk, device, gradient_checkpointing)
