"""What a run needs of memory on each rank, from its recipe and config.json alone (X040, X041). docs/memory.md.

    peak = models + optimizers + the largest of { pack, optimizer step, rollout, checkpoint } + what the heap keeps

Everything in bytes. An upper bound where the data decides: packs are taken as full and rows as long as the recipe
allows. The terms are those of memory_terms.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from rlhfctl.preflight.decoder import Shape, lora_parameters, quantized_bytes, shape_of
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs, NotThere
from rlhfctl.preflight.machine import processes, uses_bfloat16, world_size
from rlhfctl.preflight.memory_terms import (
    Bytes,
    dense_matrix,
    full_pack,
    head_gradient,
    head_logits,
    kept_activations,
    layer_gradients,
    offloaded_bytes,
    pack_tokens,
    repeated_keys,
    rollout_bytes,
    row_length,
    step_bytes,
    tensors,
    weight_gradients,
    zero_bytes,
)
from rlhfctl.preflight.shards import WHOLE, Shards, shards_of
from rlhfctl.recipe.deepspeed_section import DeepSpeed
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.recipe.tasks import AnyRecipe, OreoRecipe, PpoRecipe, RmRecipe

RUNTIME = 420 << 20  # the interpreter with torch and transformers, before any model: measured
MOMENTS, MASTER = 8, 4  # AdamW's two moments and, for bfloat16 weights, the float32 copy
# On a CPU, measured with benchmarks/memory.py: what the heap keeps of tensors that come and go, and oneDNN's kernels.
HEAP, KERNELS = 0.4, 40 << 20
CLOSE = 0.8  # an estimate above this share of what is free is worth a warning


@dataclass(slots=True)
class Estimate:
    """Bytes per rank. activations and logits: of one pack, with the head's gradient; zero_buffers: gradients on their
    way to the rank that keeps them, and gathered parameters; kv_cache: of a rollout batch with its logits and the
    policy's matrices as it reads them; value_model, implicit_prm: all that belongs to them but activations; merged:
    final/ with LoRA folded in; allocator: what the process holds of what was freed; offloaded: in CPU memory beside a
    GPU's, not in the peak."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    zero_buffers: int = 0
    kv_cache: int = 0
    reference: int = 0
    value_model: int = 0
    implicit_prm: int = 0
    reward_model: int = 0
    merged: int = 0
    allocator: int = 0
    offloaded: int = 0
    peak: int = 0

    def parts(self) -> dict[str, int]:
        return {each.name: int(getattr(self, each.name)) for each in fields(self)}


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model on one rank. weights, optimizer: always there, or `away` in the CPU's memory. gradients: after
    its last pack; step: beside them in the optimizer step; buffers: ZeRO's, while it passes backward; saved: on rank 0
    while a checkpoint is written."""

    weights: int
    optimizer: int
    away: int
    gradients: Bytes
    step: Bytes
    buffers: int
    saved: Bytes


def trained_model(
    recipe: AnyRecipe,
    shape: Shape,
    width: int,
    frozen: int | None,
    trained: int,
    head: bool,
    world: int,
    shards: Shards,
    cpu: bool,
) -> Trained:
    """trained: parameters that move. frozen: bytes under an adapter, None where the model trains in full. head: whether
    it has the language model's."""
    zero = recipe.deepspeed
    own = 4 if frozen is not None else width  # adapters are float32 whatever the weights are
    # DeepSpeed steps a float32 copy of its part even where the weights are float32.
    copied = MOMENTS + (MASTER if own == 2 or (zero is not None and zero.zero_stage) else 0)
    whole = trained * own + (frozen or 0)
    full = Bytes(trained * own) if frozen is not None else weight_gradients(shape, trained, own, head)
    gradients = full if shards.gradients == 1 else Bytes(full.total // shards.gradients)
    largest = 0 if frozen is not None else shape.table
    saved = Bytes()
    if zero is not None:  # rank 0 puts every tensor together
        states = copied if own == 2 else MOMENTS
        saved = Bytes(trained * states + (whole if shards.weights > 1 else 0), full.large // own * states)
    weights = (frozen or 0) // shards.weights
    weights += trained * own // (1 if frozen is not None else shards.weights)
    optimizer = trained * copied // shards.optimizer
    away = 0
    if zero is not None and zero.offload != "none":
        many = pack_tokens(recipe, world)[1]
        optimizer += offloaded_bytes(recipe, trained // shards.optimizer, own, largest, many)
        if zero.zero_stage == 2:
            gradients = Bytes()  # in CPU memory as soon as they are summed
        if not cpu:
            away, optimizer = optimizer, 0
            if zero.offload == "all":
                away, weights = away + weights, 0
    return Trained(
        weights=weights,
        optimizer=optimizer,
        away=away,
        gradients=gradients,
        step=tensors(step_bytes(recipe, trained, own, largest, world, shards.optimizer, gradients.total)),
        buffers=zero_bytes(recipe, trained, whole // width, width),
        saved=saved,
    )


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
    is_rm, lora = isinstance(recipe, RmRecipe), recipe.policy.lora
    parameters = shape.trunk + shape.hidden if is_rm else shape.parameters
    quantized = parameters * width - quantized_bytes(recipe.policy, shape, width)
    policy = trained_model(
        recipe,
        shape,
        width,
        None if lora is None else quantized,
        parameters if lora is None else lora_parameters(lora, shape),
        not is_rm,
        world,
        shards,
        cpu,
    )
    critic = value_model(recipe, shape, width, world, shards, cpu)
    prm = None
    if isinstance(recipe, PpoRecipe) and recipe.algorithm.advantage == "prime":
        prm = trained_model(recipe, shape, width, None, shape.parameters, True, world, shards, cpu)

    found = Estimate(weights=policy.weights, gradients=policy.gradients.total, optimizer=policy.optimizer)
    moments = passes(found, recipe, shape, width, world, cpu, policy, critic, prm)
    if critic is not None:
        found.value_model = critic.weights + critic.optimizer + critic.gradients.total
    if prm is not None:  # and what it started from
        found.implicit_prm = prm.weights + prm.optimizer + prm.gradients.total + shape.parameters * width
    if has_reference(recipe):
        found.reference = shape.parameters * width
    for each in reward_configs or []:
        other = shape_of(each)
        found.reward_model += (other.trunk + other.hidden) * width if other is not None else 0
    if isinstance(recipe, PpoRecipe):
        found.kv_cache = rollout_bytes(recipe, shape, width, world, cpu)
        moments.append(Bytes(found.kv_cache))
    every = [each for each in (policy, critic, prm) if each is not None]
    found.offloaded = sum(each.away for each in every)
    if cpu:
        moments.append(sum((each.saved for each in every), start=Bytes()))
        if recipe.policy.quantization != "none":
            moments.append(Bytes(parameters * width))  # loaded whole, then quantised
    stays = sum(each.weights + each.optimizer for each in every) + found.reference + found.reward_model
    stays += shape.parameters * width if prm is not None else 0
    fullest = max(moments, key=lambda moment: moment.total + HEAP * cpu * (moment.total - moment.large))
    if cpu:
        found.allocator = int(HEAP * (fullest.total - fullest.large)) + KERNELS
    if lora is not None and lora.merge_final:
        found.merged = parameters * width  # made from memory of its own: the heap's holes are too small
    found.peak = stays + fullest.total + found.allocator + (found.merged if cpu else 0)
    return found


def passes(
    found: Estimate,
    recipe: AnyRecipe,
    shape: Shape,
    width: int,
    world: int,
    cpu: bool,
    policy: Trained,
    critic: Trained | None,
    prm: Trained | None,
) -> list[Bytes]:
    """What each kind of pass and step holds; activations, logits and buffers are written into `found`."""
    nothing = Bytes()
    lora, checkpointing = recipe.policy.lora is not None, recipe.policy.gradient_checkpointing
    tokens, many = pack_tokens(recipe, world)
    keys = repeated_keys(recipe)
    apart = gathered(recipe)
    kept = kept_activations(shape, width, tokens, lora, checkpointing, cpu, keys, narrow(recipe), apart)
    logits = head_logits(recipe, shape, tokens, cpu)
    head = logits + (nothing if lora else head_gradient(recipe, shape, width, tokens, many, cpu))
    kept += dense_matrix(recipe.policy, shape, width)
    found.activations, found.logits = kept.total, head.total
    found.zero_buffers = policy.buffers + (critic.buffers if critic else 0)
    buffers = Bytes(found.zero_buffers)
    growing = nothing if lora else layer_gradients(shape, width, tokens)

    def earlier(model: Trained | None) -> Bytes:
        """Gradients of earlier packs; those of a lone pack grow as its activations go."""
        return model.gradients if model is not None and many else nothing

    def done(model: Trained | None) -> Bytes:
        return model.gradients if model is not None else nothing

    pack = earlier(policy) + buffers + kept + head
    last = policy.gradients + growing
    copies = max((each.step for each in (policy, critic) if each), key=lambda copy: copy.total)
    step = policy.gradients + done(critic) + copies  # one steps after the other
    moments = [step]
    if critic is None:
        moments += [pack, last]
    elif isinstance(recipe, OreoRecipe):
        # Both graphs while the policy passes forward; the value model's is freed before the policy passes backward.
        both = earlier(policy) + earlier(critic) + buffers + kept + kept + logits
        moments += [both, pack + done(critic), last + done(critic)]
    else:
        values = recipe.values_of()
        adapted = values is not None and values.lora is not None
        own = kept_activations(shape, width, tokens, adapted, checkpointing, cpu, keys, gathered=apart)
        own += buffers
        if passes_once(recipe):  # the value model's packs come first
            moments += [earlier(critic) + own, pack + done(critic), last + done(critic)]
        else:
            moments += [pack + earlier(critic), done(policy) + earlier(critic) + own, last + done(critic)]
    if prm is not None:  # rows one by one, the whole batch
        longest = row_length(recipe)
        tokens, many = full_pack(recipe, longest, longest * max(1, recipe.train.batch_size // world))
        whole = kept_activations(shape, width, tokens, False, checkpointing, cpu, gathered=apart)
        matrix = head_logits(recipe, shape, tokens, cpu) + head_gradient(
            recipe, shape, width, tokens, many, cpu
        )
        before = prm.gradients if many else nothing
        moments += [before + Bytes(prm.buffers) + whole + matrix, prm.gradients + prm.step]
    return moments


def passes_once(recipe: AnyRecipe) -> bool:
    """As trainers/value_once.py: whether values are read and trained on in one pass, before the policy's."""
    if not isinstance(recipe, PpoRecipe) or recipe.deepspeed is not None:
        return False
    return recipe.algorithm.ppo_epochs == 1 and recipe.algorithm.minibatches == 1


def narrow(recipe: AnyRecipe) -> bool:
    """Whether the head reads few positions of a row, a reward model its last. Checkpointing and ZeRO-3 pass all."""
    if not isinstance(recipe, RmRecipe) or recipe.policy.gradient_checkpointing:
        return False
    return recipe.algorithm.score != "token_sum" and not gathered(recipe)


def gathered(recipe: AnyRecipe) -> bool:
    """Whether a layer's matrices are there whole only while it computes (ZeRO-3)."""
    return recipe.deepspeed is not None and recipe.deepspeed.zero_stage == 3


def value_model(
    recipe: AnyRecipe, shape: Shape, width: int, world: int, shards: Shards, cpu: bool
) -> Trained | None:
    """A second trained model; with adapters on both it stands on the policy's own backbone."""
    spec = recipe.values_of()
    if spec is None or spec.shared_trunk:
        return None
    size = shape.trunk + shape.hidden
    if spec.lora is None:
        return trained_model(recipe, shape, width, None, size, False, world, shards, cpu)
    hosted = recipe.policy.lora is not None and spec.init == "policy"
    adapter = lora_parameters(spec.lora, shape) + shape.hidden
    frozen = 0 if hosted else size * width
    return trained_model(recipe, shape, width, frozen, adapter, False, world, shards, cpu)


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
    host = inputs.machine.memory // processes(inputs)
    if gpus and host and found.offloaded + RUNTIME > CLOSE * host:
        yield Finding(
            "X041",
            "warning",
            f"about {size(found.offloaded + RUNTIME)} of CPU memory per rank for what deepspeed.offload keeps there, "
            f"and {size(host)} is free for each",
            fix="more nodes, or a smaller model",
            side="machine",
            evidence={"needed": found.offloaded + RUNTIME, "free": host},
        )
    free = min(gpu.memory for gpu in gpus) if gpus else host
    needed = found.peak + RUNTIME
    if not free or needed <= CLOSE * free:
        return
    ways = [
        (what, each.peak + RUNTIME)
        for what, each in changes(inputs.recipe, of, world_size(inputs), bool(gpus))
    ]
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


def changes(recipe: AnyRecipe, of: Any, world: int = 1, gpus: bool = False) -> Iterator[tuple[str, Estimate]]:
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
    if gpus and stage and recipe.deepspeed is not None and recipe.deepspeed.offload == "none":
        spec = recipe.deepspeed.model_copy(update={"offload": "optimizer"})
        options.append(("deepspeed.offload=optimizer", recipe.model_copy(update={"deepspeed": spec})))
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
