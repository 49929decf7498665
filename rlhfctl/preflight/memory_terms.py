"""The terms of the estimate of memory: what one pack, one optimizer step, one rollout holds. docs/memory.md.

w bytes of a weight (4, or 2 in bfloat16), T tokens of a pack, L layers, H hidden, A heads x head size, K key/value
heads x head size, I inner size, V vocabulary. Bytes throughout.
"""

from dataclasses import dataclass

from rlhfctl.preflight.decoder import Shape
from rlhfctl.processor import packs_few_rows
from rlhfctl.recipe.sections import Policy
from rlhfctl.recipe.tasks import AnyRecipe, OreoRecipe, PpoRecipe, RmRecipe

CHUNK_ELEMENTS = 1 << 24  # of models/head.py: logits that exist at once
TILE, LARGE = 512, 32_768  # of models/head_tiles.py: vocabularies from LARGE on go in tiles
BUCKET = 128  # of models/linear.py: packs are filled up to a multiple of it
CAST_ELEMENTS = 1 << 22  # of trainers/optimizer.py: gradients that are cast for their masters at a time
REDUCED = 1 << 24  # of trainers/distributed.py: elements of gradients that travel together
REDUCED_ZERO_0 = 500_000_000  # DeepSpeed's, where it divides nothing
RETURNED = 32 << 20  # glibc gives tensors of this size back to the system as soon as they are freed
# DeepSpeed's stage3_max_live_parameters: gathered ones that stay between two passes; sub_group_size: stepped together.
LIVE, SUB_GROUP = 10**9, 10**9


@dataclass(frozen=True, slots=True)
class Bytes:
    """What comes and goes. large: how much of it is in tensors that go back to the system when they are freed."""

    total: int = 0
    large: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.total + other.total, self.large + other.large)


def tensors(size: int, count: float = 1) -> Bytes:
    """`count` tensors of `size` bytes."""
    total = int(count * size)
    return Bytes(total, total if size >= RETURNED else 0)


def row_length(recipe: AnyRecipe) -> int:
    """Tokens of the longest row (ppo: prompt and response)."""
    if isinstance(recipe, PpoRecipe) and recipe.rollout.max_prompt_length is not None:
        return recipe.rollout.max_prompt_length + recipe.rollout.max_new_tokens
    return recipe.data.max_length


def pack_tokens(recipe: AnyRecipe, world: int) -> tuple[int, bool]:
    """T of the largest pack, and whether a step may have several: rows as long as the recipe allows."""
    longest = row_length(recipe) * (2 if isinstance(recipe, RmRecipe) else 1)
    minibatches = recipe.algorithm.minibatches if isinstance(recipe, PpoRecipe) else 1
    rows = max(1, recipe.train.batch_size // minibatches // world)
    passing = rows * longest
    if isinstance(recipe, PpoRecipe) and repeated_keys(recipe) > 1:
        # A minibatch is drawn from all samples, and ranks share a prompt's: fewer of one prompt meet there.
        most = rows if world == 1 else max(1, rows // 2)
        together = min(most, max(1, recipe.rollout.n // minibatches))
        new = recipe.rollout.max_new_tokens
        shared = -(-rows // together) * (longest - new) + rows * new
        passing = min(passing, max(shared, rows * new * 5 // 4))  # or prompts just too short to be shared
    return full_pack(recipe, longest, passing)


def full_pack(recipe: AnyRecipe, longest: int, passing: int) -> tuple[int, bool]:
    """As pack_tokens. passing: tokens of a step on this rank; longest: of a row."""
    budget = max(recipe.train.tokens_per_microbatch, longest)
    return -(-min(budget, passing) // BUCKET) * BUCKET, passing > budget


def repeated_keys(recipe: AnyRecipe) -> float:
    """Tokens whose keys and values a layer on a GPU holds for each token of a pack: samples share their prompt's pass
    (models/shared_prefix.py), and each holds a copy of its keys and values."""
    if not isinstance(recipe, PpoRecipe):
        return 1.0
    new, n = recipe.rollout.max_new_tokens, recipe.rollout.n
    prompt = max(1, row_length(recipe) - new)
    if 4 * prompt < new:
        return 1.0  # too short to be shared
    return n * (prompt + new) / (prompt + n * new)


def kept_activations(
    shape: Shape,
    width: int,
    tokens: int,
    lora: bool,
    checkpointing: bool,
    cpu: bool,
    keys: float = 1.0,
    narrow: bool = False,
    gathered: bool = False,
) -> Bytes:
    """From the forward pass to the backward pass, with what one layer's backward adds. narrow: few rows of the last
    layer are read, and its MLP computes them alone (models/last_layer.py). gathered: as ZeRO-3 does, layer by layer."""
    layer = layer_activations(shape, width, tokens, lora, cpu, keys, gathered)
    kept = tensors(tokens * shape.hidden * width) if checkpointing else layer
    layers = shape.layers - (1 if narrow else 0)
    every = Bytes(kept.total * layers, kept.large * layers)
    if narrow:
        every += attention_activations(shape, width, tokens, lora, cpu, keys)
    # Behind the last layer: its norm and the states that the head reads.
    ends = tensors(tokens * shape.hidden * width, 4)
    return every + ends + layer_gradients(shape, width, tokens) + (layer if checkpointing else Bytes())


def layer_activations(
    shape: Shape, width: int, tokens: int, lora: bool, cpu: bool, keys: float = 1.0, gathered: bool = False
) -> Bytes:
    """One layer: residuals and norms, attention, gated MLP (of it two tensors less on a CPU: models/gated.py; with LoRA
    or a matrix that is not there whole its last product's input is kept)."""
    gated = (3 if lora or gathered else 2) if cpu else 4
    # In float32 on a CPU the output projection reads the very tensor that attention keeps.
    attended = tensors(tokens * shape.heads * width, 0 if cpu and width == 4 else 1)
    return (
        attention_activations(shape, width, tokens, lora, cpu, keys)
        + tensors(tokens * shape.hidden * width, norm_tensors(width, lora, cpu))
        + attended
        + tensors(tokens * shape.inner * width, gated)
    )


def attention_activations(shape: Shape, width: int, tokens: int, lora: bool, cpu: bool, keys: float) -> Bytes:
    """Of one layer, up to the projection of what it attends to. On a CPU keys and values are kept as they are
    (models/pack_attention.py); a kernel with a mask wants one key head a query head."""
    norm = tensors(tokens * shape.hidden * width, norm_tensors(width, lora, cpu))
    if cpu:
        own = tensors(tokens * shape.heads * width) + tensors(tokens * shape.groups * width, 2)
        return norm + own + tensors(tokens * shape.heads * 4)
    groups = shape.heads if keys > 1 else shape.groups
    return norm + tensors(tokens * shape.heads * width, 2) + tensors(int(keys * tokens) * groups * width, 2)


def norm_tensors(width: int, lora: bool, cpu: bool) -> float:
    """[T, H] tensors of a norm, what it gives included. On a CPU its gradient is written out (models/norm.py);
    autograd keeps what was normed, for a weight that moves its product, and of bfloat16 the cast."""
    if cpu:
        return 2
    return (2 * width + (0 if lora else width) + (4 if width == 2 else 0)) / width


def layer_gradients(shape: Shape, width: int, tokens: int) -> Bytes:
    """What the backward pass of a layer holds: gradients inside the MLP and of the residual stream."""
    return tensors(tokens * shape.inner * width, 3) + tensors(tokens * shape.hidden * width, 2)


def in_tiles(recipe: AnyRecipe, shape: Shape, cpu: bool) -> bool:
    """Whether the head goes in tiles: all but oreo's, whose exact KL needs whole distributions."""
    return cpu and shape.vocabulary >= LARGE and not isinstance(recipe, OreoRecipe)


def head_logits(recipe: AnyRecipe, shape: Shape, tokens: int, cpu: bool) -> Bytes:
    """Float32 logits that exist at a time: of chunks of rows, or of tiles of tokens with the rows' gradient."""
    if isinstance(recipe, RmRecipe):
        return Bytes()
    if in_tiles(recipe, shape, cpu):
        return tensors(tokens * TILE * 4, 3) + tensors(tokens * shape.hidden * 4, 3)
    rows = chunk_rows(shape, tokens)
    bonus = isinstance(recipe, PpoRecipe) and recipe.algorithm.entropy_coef > 0
    chunks = 4 if bonus else 2  # oreo: both models' distributions, in the memory of their logits
    return tensors(rows * shape.vocabulary * 4, chunks)


def chunk_rows(shape: Shape, tokens: int) -> int:
    return min(tokens, max(16, CHUNK_ELEMENTS // shape.vocabulary))


def head_gradient(recipe: AnyRecipe, shape: Shape, width: int, tokens: int, many: bool, cpu: bool) -> Bytes:
    """Of a trained head, beside the gradients of earlier packs. Chunks make a matrix of their own and add product after
    product to it; ppo's starts as the first product. Tiles add to the gradient that is there
    (models/direct_gradient.py): a first pack makes it. DeepSpeed takes it from a matrix of its own."""
    if isinstance(recipe, RmRecipe):
        return Bytes()
    table = shape.table * width
    if in_tiles(recipe, shape, cpu):
        return Bytes() if many and recipe.deepspeed is None else tensors(table)
    lone = isinstance(recipe, PpoRecipe) and chunk_rows(shape, tokens) == tokens
    return tensors(table, 1 if lone else 2)


def weight_gradients(shape: Shape, trained: int, width: int, head: bool) -> Bytes:
    """Gradients of a model trained in full. head: whether it has the language model's."""
    tables = tensors(shape.table * width, 2 if head and not shape.tied else 1)
    return Bytes(trained * width, tables.large)


def step_bytes(
    recipe: AnyRecipe, trained: int, width: int, largest: int, world: int, divided: int, held: int
) -> int:
    """Beside the `held` bytes of gradients: float32 copies for the masters, or for the way to the other ranks.

    largest: elements of the largest matrix. DeepSpeed keeps the gradients of its part, flattens them and casts the
    flat tensor."""
    if recipe.deepspeed is not None and recipe.deepspeed.zero_stage:
        if recipe.deepspeed.offload != "none":
            return 0  # the flat tensor is there from the start: `offloaded_bytes`
        part = trained // divided
        flat = min(part, SUB_GROUP) if recipe.deepspeed.zero_stage == 3 else part
        return max(0, part * width + flat * (4 + (width if width < 4 else 0)) - held)
    cast = min(trained, max(CAST_ELEMENTS, largest)) if width < 4 else 0
    bucket = REDUCED if recipe.deepspeed is None else REDUCED_ZERO_0
    sent = min(trained, bucket + largest) if world > 1 else 0
    return max(cast, sent) * 4


def zero_bytes(recipe: AnyRecipe, trained: int, parameters: int, width: int) -> int:
    """Of one engine while it passes backward. ZeRO-2 and 3 hold a bucket of gradients until it is full, in float32 as
    it travels (ZeRO-1 with an offloaded optimizer too); ZeRO-3 keeps gathered parameters from the forward to the
    backward pass, LIVE of them at most."""
    spec = recipe.deepspeed
    if spec is None or (spec.zero_stage < 2 and spec.offload == "none"):
        return 0
    return min(trained, spec.bucket_elements) * 4 + (
        min(parameters, LIVE) * width if spec.zero_stage == 3 else 0
    )


def offloaded_bytes(recipe: AnyRecipe, part: int, width: int, largest: int, many: bool) -> int:
    """In CPU memory beside moments and masters of this rank's `part`, with deepspeed.offload: its gradients in float32.
    Below ZeRO-3 also new weights on their way back, a buffer for the largest matrix, and where a step has several
    packs the sum of their gradients."""
    spec = recipe.deepspeed
    if spec is None or spec.offload == "none":
        return 0
    below = part * (2 if many else 1) * width + largest * width
    return part * 4 + (below if spec.zero_stage < 3 else 0)


def dense_matrix(policy: Policy, shape: Shape, width: int) -> Bytes:
    """Of quantised layers one matrix is dequantised at a time; from 8 bits by two products in float32."""
    if policy.quantization == "none":
        return Bytes()
    largest = max(rows * columns for rows, columns in shape.linear.values())
    return tensors(largest * 4, 2) if policy.quantization == "int8" else tensors(largest * width)


def rollout_bytes(recipe: PpoRecipe, shape: Shape, width: int, world: int, cpu: bool) -> int:
    """Keys and values of a batch of samples, one layer of them copied, and their logits while a token is drawn. For
    `hf` the policy's matrices too: fused (rollout/decode.py; all but the embedding), in float32 on Intel's processors
    once more as MKL wants them, or gathered at ZeRO-3."""
    length = row_length(recipe)
    samples = max(1, recipe.train.batch_size // world)
    rows = max(recipe.rollout.n, min(samples, recipe.rollout.max_batch_tokens // length))
    cache = 2 * rows * length * shape.groups * (4 if cpu else width)
    policy = 0
    if recipe.rollout.engine == "hf":
        gathered = recipe.deepspeed is not None and recipe.deepspeed.zero_stage == 3
        policy = shape.parameters if gathered or shape.tied else shape.parameters - shape.table
        if cpu and width == 4 and not gathered and packs_few_rows():
            policy *= 2
    return (shape.layers + 1) * cache + 4 * rows * shape.vocabulary * 4 + policy * width
