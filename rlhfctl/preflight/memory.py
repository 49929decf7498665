"""What a run needs of memory on each rank, from its recipe and config.json alone (X040, X041). docs/memory.md.

    peak = models + optimizer + the largest of { update, optimizer step, rollout }

P parameters, w bytes of a weight (4, or 2 in bfloat16), T tokens of a pack, L layers, H hidden, A heads x head size,
K key/value heads x head size, I inner size, V vocabulary. Everything in bytes. An upper bound where the data decides:
packs are taken as full and rows as long as the recipe allows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, NotThere
from rlhfctl.preflight.machine import processes, uses_bfloat16, world_size
from rlhfctl.preflight.shards import WHOLE, Shards, shards_of
from rlhfctl.recipe.deepspeed_section import DeepSpeed
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.recipe.tasks import AnyRecipe, OreoRecipe, PpoRecipe, RmRecipe

CHUNK_ELEMENTS = 1 << 24  # of models/head.py: logits of so many elements exist at once
BUCKET = 128  # of models/linear.py: packs are filled up to a multiple of it
RUNTIME = 420 << 20  # the interpreter with torch and transformers, before any model: measured
MOMENTS, MASTER = 8, 4  # AdamW's two moments and, for bfloat16 weights, the float32 copy
# On a CPU, measured with benchmarks/memory.py: what the heap keeps of tensors that come and go, and oneDNN's kernels.
HEAP, KERNELS = 0.4, 40 << 20
RETURNED = 32 << 20  # glibc gives tensors of this size back to the system as soon as they are freed
LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters: gathered ones that stay between two passes
CLOSE = 0.8  # an estimate above this share of what is free is worth a warning


@dataclass(slots=True)
class Estimate:
    """Bytes per rank. activations and logits: of one pack; zero_buffers: gradients on their way to the rank that keeps
    them, and gathered parameters; kv_cache: of a rollout batch with its logits, and at ZeRO-3 the whole policy;
    merged: final/ with LoRA folded in; allocator: what the process holds of what was freed."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    zero_buffers: int = 0
    kv_cache: int = 0
    reference: int = 0
    value_model: int = 0
    reward_model: int = 0
    merged: int = 0
    allocator: int = 0
    peak: int = 0

    def parts(self) -> dict[str, int]:
        return {each.name: int(getattr(self, each.name)) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes. lora: columns and rows of each linear layer by the last part of its name."""

    layers: int
    hidden: int
    heads: int  # x head size
    groups: int  # key/value heads x head size
    inner: int
    vocabulary: int
    tied: bool
    linear: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def trunk(self) -> int:
        matrices = sum(rows * columns for rows, columns in self.linear.values())
        return self.vocabulary * self.hidden + self.layers * (matrices + 2 * self.hidden) + self.hidden

    @property
    def parameters(self) -> int:
        return self.trunk + (0 if self.tied else self.vocabulary * self.hidden)


def shape_of(config: dict[str, Any]) -> Shape | None:
    """None where the usual keys of a decoder with a gated MLP are absent."""
    try:
        hidden, layers, inner = (
            int(config[k]) for k in ("hidden_size", "num_hidden_layers", "intermediate_size")
        )
        count, vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
        size = int(config.get("head_dim") or hidden // count)
        groups = int(config.get("num_key_value_heads") or count) * size
    except (KeyError, TypeError, ValueError):
        return None
    heads = count * size
    linear = {
        "q_proj": (heads, hidden),
        "k_proj": (groups, hidden),
        "v_proj": (groups, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    tied = bool(config.get("tie_word_embeddings", False))
    return Shape(layers, hidden, heads, groups, inner, vocabulary, tied, linear)


def estimate(
    recipe: AnyRecipe,
    config: dict[str, Any],
    bfloat16: bool,
    cpu: bool = True,
    world: int = 1,
    reward_configs: list[dict[str, Any]] | None = None,
    shards: Shards = WHOLE,
) -> Estimate | None:
    """config: the policy's config.json. cpu: kernels as they are there. None for an architecture it does not know."""
    shape = shape_of(config)
    if shape is None:
        return None
    width = 2 if bfloat16 else 4
    is_rm = isinstance(recipe, RmRecipe)
    lora, checkpointing = recipe.policy.lora, recipe.policy.gradient_checkpointing
    parameters = shape.trunk + shape.hidden if is_rm else shape.parameters
    trained = parameters if lora is None else lora_parameters(recipe, shape)
    # Adapters are float32 whatever the weights are.
    own = width if lora is None else 4
    frozen = parameters * width - quantized_bytes(recipe, shape, width)
    found = Estimate(weights=frozen // shards.weights + (trained * 4 if lora is not None else 0))
    found.gradients = trained * own // shards.gradients
    zero = recipe.deepspeed.zero_stage if recipe.deepspeed is not None else 0
    # DeepSpeed steps a float32 copy of its part even where the weights are float32.
    copied = MOMENTS + (MASTER if own == 2 or zero else 0)
    found.optimizer = trained * copied // shards.optimizer

    tokens, many = pack_tokens(recipe, world)
    found.activations = tokens * activation_bytes(shape, width, lora is not None, checkpointing, cpu)
    if not is_rm:
        found.logits = head_bytes(recipe, shape, tokens, width, lora is None)
    found.zero_buffers = zero_bytes(recipe, trained, parameters, width)
    step = trained * 4 // shards.optimizer if own == 2 else 0  # gradients of the masters
    # Gradients of earlier packs stand beside this pack's activations; those of a lone pack grow as activations go.
    before = (found.gradients if many else 0) + found.zero_buffers
    update = max(before + found.activations + found.logits, found.gradients + step)
    if not many and lora is None:
        update = max(update, found.gradients + layer_bytes(shape, width, tokens))

    critic = 0
    if has_critic(recipe):
        size = shape.trunk + shape.hidden
        copied = MOMENTS + (MASTER if width == 2 or zero else 0)
        gradients = size * width // shards.gradients
        critic = size * width // shards.weights + size * copied // shards.optimizer
        found.value_model = critic + gradients
        found.zero_buffers += zero_bytes(recipe, size, size, width)
        beside = found.activations if isinstance(recipe, OreoRecipe) else 0  # both graphs at a time
        alone = tokens * activation_bytes(shape, width, False, checkpointing, cpu) + found.zero_buffers
        master = size * 4 // shards.optimizer if width == 2 else 0
        update = max(
            update + beside + (gradients if many else 0),
            found.gradients + gradients + alone,
            found.gradients + gradients + step + master,
        )
    if has_reference(recipe):
        found.reference = shape.parameters * width
    for each in reward_configs or []:
        other = shape_of(each)
        found.reward_model += (other.trunk + other.hidden) * width if other is not None else 0
    if isinstance(recipe, PpoRecipe):
        found.kv_cache = rollout_bytes(recipe, shape, width, world, cpu)
        if zero == 3 and recipe.rollout.engine == "hf":
            found.kv_cache += parameters * width  # it samples from whole weights
    persistent = found.weights + found.optimizer + critic + found.reference + found.reward_model
    transient = max(update, found.kv_cache)
    large = returned_bytes(recipe, shape, tokens, width, lora is None) if transient == update else 0
    found.allocator = int(HEAP * (transient - large)) + KERNELS if cpu else 0
    if lora is not None and lora.merge_final:
        found.merged = parameters * width  # made from memory of its own: the heap's holes are too small
    found.peak = persistent + transient + found.allocator + (found.merged if cpu else 0)
    return found


def zero_bytes(recipe: AnyRecipe, trained: int, parameters: int, width: int) -> int:
    """Of one engine while it passes backward. ZeRO-2 and 3 hold a bucket of gradients until it is full, in float32 as
    it travels; ZeRO-3 keeps gathered parameters from the forward to the backward pass, LIVE of them at most."""
    spec = recipe.deepspeed
    if spec is None or spec.zero_stage < 2:
        return 0
    return min(trained, spec.bucket_elements) * 4 + (
        min(parameters, LIVE) * width if spec.zero_stage == 3 else 0
    )


def lora_parameters(recipe: AnyRecipe, shape: Shape) -> int:
    lora = recipe.policy.lora
    assert lora is not None
    wanted = lora.target_modules
    chosen = [size for name, size in shape.linear.items() if wanted == "all-linear" or name in wanted]
    return shape.layers * sum(lora.rank * (rows + columns) for rows, columns in chosen)


def quantized_bytes(recipe: AnyRecipe, shape: Shape, width: int) -> int:
    """What policy.quantization takes off the matrices of the layers."""
    policy = recipe.policy
    if policy.quantization == "none":
        return 0
    kept = 1.0 if policy.quantization == "int8" else 0.5 + 4 / policy.quantization_block
    matrices = shape.layers * sum(rows * columns for rows, columns in shape.linear.values())
    return int(matrices * (width - kept))


def pack_tokens(recipe: AnyRecipe, world: int) -> tuple[int, bool]:
    """Tokens of the largest pack, and whether a step may have several: rows as long as data.max_length."""
    sides = 2 if isinstance(recipe, RmRecipe) else 1
    longest = recipe.data.max_length * sides
    minibatches = recipe.algorithm.minibatches if isinstance(recipe, PpoRecipe) else 1
    rows = max(1, recipe.train.batch_size // minibatches // world)
    budget = max(recipe.train.tokens_per_microbatch, longest)
    tokens = min(budget, rows * longest)
    return -(-tokens // BUCKET) * BUCKET, rows * longest > budget


def activation_bytes(shape: Shape, width: int, lora: bool, checkpointing: bool, cpu: bool) -> int:
    """Of one token, kept from the forward pass to the backward pass, with what one layer's backward adds."""
    layer = layer_elements(shape, width, lora, cpu)
    kept = shape.hidden * width if checkpointing else layer
    # Behind the last layer: its norm and the states that the head reads. Within a layer: gradients of the MLP.
    ends = 4 * shape.hidden * width
    working = (3 * shape.inner + 2 * shape.hidden) * width + (layer if checkpointing else 0)
    return shape.layers * kept + ends + working


def layer_elements(shape: Shape, width: int, lora: bool, cpu: bool) -> int:
    """Bytes of one token in one layer: residuals and norms, attention, gated MLP."""
    hidden, heads, inner = shape.hidden, shape.heads, shape.inner
    exact = 4 if cpu else width  # the CPU's attention computes in float32
    groups = heads if cpu else shape.groups  # and wants one key head a query head
    norms = 2 * hidden * (2 * width + (0 if lora else width) + (4 if width == 2 else 0))
    attention = (heads + 2 * groups + heads) * exact + heads * width
    return norms + attention + 4 * inner * width


def layer_bytes(shape: Shape, width: int, tokens: int) -> int:
    return tokens * (3 * shape.inner + 2 * shape.hidden) * width


def head_bytes(recipe: AnyRecipe, shape: Shape, tokens: int, width: int, trained: bool) -> int:
    """Chunks of float32 logits that exist at a time, and the head's gradient twice: what adds up, and what is added."""
    rows = min(tokens, max(16, CHUNK_ELEMENTS // shape.vocabulary))
    chunks = 2 if recipe.task == "sft" else 4 if isinstance(recipe, OreoRecipe) else 3
    gradient = 2 * shape.vocabulary * shape.hidden * width if trained else 0
    return chunks * rows * shape.vocabulary * 4 + gradient


def returned_bytes(recipe: AnyRecipe, shape: Shape, tokens: int, width: int, trained: bool) -> int:
    """Of the update: gradients and logits as wide as a large vocabulary, each in memory of its own."""
    table = shape.vocabulary * shape.hidden * width
    copies = (1 if isinstance(recipe, RmRecipe) else 3 if shape.tied else 4) if trained else 0
    chunk = 0 if isinstance(recipe, RmRecipe) else head_bytes(recipe, shape, tokens, width, False)
    rows = min(tokens, max(16, CHUNK_ELEMENTS // shape.vocabulary))
    large = table * copies if table >= RETURNED else 0
    return large + (chunk if rows * shape.vocabulary * 4 >= RETURNED else 0)


def rollout_bytes(recipe: PpoRecipe, shape: Shape, width: int, world: int, cpu: bool) -> int:
    """Keys and values of a batch of samples, one layer of them copied, and their logits while a token is drawn; for
    `hf` the fused copy of the matrices that lives as long as a rollout (rollout/decode.py)."""
    length = recipe.data.max_length
    samples = max(1, recipe.train.batch_size // world)
    rows = max(recipe.rollout.n, min(samples, recipe.rollout.max_batch_tokens // length))
    cache = 2 * rows * length * shape.groups * (4 if cpu else width)
    fused = shape.parameters * width if recipe.rollout.engine == "hf" else 0
    return (shape.layers + 1) * cache + 4 * rows * shape.vocabulary * 4 + fused


def has_critic(recipe: AnyRecipe) -> bool:
    """A second trained model."""
    if isinstance(recipe, OreoRecipe):
        return not recipe.value_model.shared_trunk
    if not isinstance(recipe, PpoRecipe) or recipe.algorithm.advantage != "gae":
        return False
    return recipe.value_model is None or not recipe.value_model.shared_trunk


def has_reference(recipe: AnyRecipe) -> bool:
    """A frozen copy; LoRA needs none, its adapters are switched off."""
    if isinstance(recipe, OreoRecipe):
        return recipe.policy.lora is None or recipe.reference is not None
    if not isinstance(recipe, PpoRecipe) or recipe.algorithm.kl_coef == 0:
        return False
    return recipe.policy.lora is None or recipe.reference is not None


def check(inputs: Inputs) -> Iterator[Finding]:
    """X040 the estimate; X041 it does not fit, with the smallest change that does."""
    try:
        config = inputs.config(inputs.policy_path)
        rewards = [inputs.config(source.path) for source in reward_models(inputs)]
    except NotThere:
        return
    gpus = inputs.machine.usable_gpus

    def of(recipe: AnyRecipe) -> Estimate | None:
        half = recipe.policy.dtype == "bfloat16" or (recipe.policy.dtype == "auto" and bool(gpus))
        world = world_size(inputs)
        return estimate(recipe, config, half, not gpus, world, rewards, shards_of(recipe, world))

    found = of(inputs.recipe)
    if found is None:
        return
    shown = ", ".join(
        f"{name} {size(value)}" for name, value in found.parts().items() if value and name != "peak"
    )
    yield Finding(
        "X040",
        "info",
        f"about {size(found.peak)} of memory per rank beside the runtime's {size(RUNTIME)}",
        shown,
        side="machine",
        evidence={
            **found.parts(),
            "runtime": RUNTIME,
            "dtype": "bfloat16" if uses_bfloat16(inputs) else "float32",
        },
    )
    free = min(gpu.memory for gpu in gpus) if gpus else inputs.machine.memory // processes(inputs)
    needed = found.peak + RUNTIME
    if not free or needed <= CLOSE * free:
        return
    ways = [(what, each.peak + RUNTIME) for what, each in changes(inputs.recipe, of, world_size(inputs))]
    fits = next((f"{what}: about {size(total)}" for what, total in ways if total <= CLOSE * free), None)
    yield Finding(
        "X041",
        "warning",
        f"about {size(needed)} of memory per rank, and {size(free)} is free for each",
        "an estimate with full packs and rows of data.max_length: see docs/memory.md",
        fits or "no single change makes it fit: more or larger machines, or a smaller model",
        "machine",
        {"needed": needed, "free": free, "changes": dict(ways)},
    )


def reward_models(inputs: Inputs) -> list[ModelSource]:
    return inputs.reward_models if isinstance(inputs.recipe, PpoRecipe) else []


def changes(recipe: AnyRecipe, of: Any, world: int = 1) -> Iterator[tuple[str, Estimate]]:
    """Single changes from the smallest on: what costs no accuracy, then what costs time, then what changes training."""

    def tried(section: str, **keys: Any) -> AnyRecipe:
        part = getattr(recipe, section).model_copy(update=keys)
        return recipe.model_copy(update={section: part})

    tokens = recipe.train.tokens_per_microbatch
    options: list[tuple[str, AnyRecipe]] = []
    while tokens > recipe.data.max_length:
        tokens = max(tokens // 2, recipe.data.max_length)
        options.append(
            (f"train.tokens_per_microbatch={tokens}", tried("train", tokens_per_microbatch=tokens))
        )
    if isinstance(recipe, PpoRecipe):
        budget = recipe.rollout.max_batch_tokens // 4
        options.append((f"rollout.max_batch_tokens={budget}", tried("rollout", max_batch_tokens=budget)))
    if not recipe.policy.gradient_checkpointing:
        options.append(("policy.gradient_checkpointing=true", tried("policy", gradient_checkpointing=True)))
    stage = recipe.deepspeed.zero_stage if recipe.deepspeed is not None else 0
    for higher in range(stage + 1, 4) if world > 1 and recipe.policy.quantization == "none" else ():
        spec = (recipe.deepspeed or DeepSpeed()).model_copy(update={"zero_stage": higher})
        options.append((f"deepspeed.zero_stage={higher}", recipe.model_copy(update={"deepspeed": spec})))
    if recipe.policy.dtype != "bfloat16":
        options.append(("policy.dtype=bfloat16", tried("policy", dtype="bfloat16")))
    if recipe.policy.lora is None and recipe.policy.path is not None:
        from rlhfctl.recipe.sections import Lora

        lora = Lora.model_validate({"rank": 16})
        options.append(("policy.lora={rank: 16}", tried("policy", lora=lora)))
    for what, changed in options:
        found = of(changed)
        if found is not None:
            yield what, found


def size(bytes: int) -> str:
    return f"{bytes / 2**30:.2f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:.0f} MiB"
