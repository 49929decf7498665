"""Draw tokens so that a sample depends on its own random numbers only: not on batch, rank, order or restart."""

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64  # tokens whose masses are summed before a draw looks inside


def stream_key(seed: int, step: int, index: int) -> int:
    """The 63-bit key of sample `index` in rollout step `step`; neighbouring triples get unrelated ones."""
    key = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) & (2**63 - 1)
    key ^= key >> 29
    return (key * 0xBF58476D1CE4E5B9) & (2**63 - 1)


def uniforms(seed: int, step: int, index: int, length: int) -> Tensor:
    """[length] uniform numbers of sample `index` in rollout step `step`: a counter-based stream."""
    generator = torch.Generator()
    generator.manual_seed(stream_key(seed, step, index))
    return torch.rand(length, generator=generator)


def draw(logits: Tensor, uniform: Tensor | None, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling; uniform None: greedy.

    logits [B, V], uniform [B] in [0, 1) -> ids [B] and their log-probabilities [B] at that temperature.
    """
    with torch.inference_mode():  # a dozen small operations cost a third less
        ids, logprobs = _draw(logits, uniform, temperature, top_p)
    return ids.clone(), logprobs.clone()


def _draw(logits: Tensor, uniform: Tensor | None, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    if uniform is not None and top_p >= 1.0:
        # A token that is drawn moves a running sum in float32: its probability is no denormal number.
        mass = scaled.softmax(-1)
        ids = invert(mass, uniform)
        return ids, mass.gather(1, ids[:, None]).squeeze(1).log_()
    logprobs = scaled.log_softmax(-1)
    if uniform is None:
        ids = logprobs.argmax(-1)
    else:
        ordered, order = logprobs.sort(-1, descending=True)
        mass = ordered.exp().cumsum(-1)
        # The nucleus is the smallest set with at least top_p of the mass; draw inside it.
        size = (mass < top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
        target = uniform[:, None] * mass.gather(1, size)
        picked = torch.minimum(torch.searchsorted(mass, target, right=True), size)
        ids = order.gather(1, picked).squeeze(1)
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)


def invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """The inverse of the distribution function: mass [B, V], uniform [B] in [0, 1) -> ids [B].

    Sums of blocks first, then inside the one block that the draw falls into: a running sum over the whole vocabulary is
    as slow as all else that a draw needs.
    """
    gap = -mass.shape[-1] % BLOCK
    blocks = (functional.pad(mass, (0, gap)) if gap else mass).unflatten(-1, (-1, BLOCK))
    upto = blocks.sum(-1).cumsum(-1)
    # Rounding leaves the last entry a little off 1: scale by it, so that every draw lands inside.
    target = below(uniform[:, None] * upto[:, -1:], upto)
    block = torch.searchsorted(upto, target, right=True)
    left = target - functional.pad(upto, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(mass), device=mass.device), block[:, 0]].cumsum(-1)
    place = torch.searchsorted(inside, below(left, inside), right=True)
    return block.mul_(BLOCK).add_(place).squeeze(1)


def below(target: Tensor, upto: Tensor) -> Tensor:
    """Short of the last of the running sums, whatever was rounded: what is drawn has a mass."""
    last = upto[:, -1:]
    return torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
