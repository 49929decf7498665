"""Draw tokens so that a sample depends on its own random numbers only: not on batch, rank, order or restart."""

import torch
from torch import Tensor


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
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    logprobs = scaled.log_softmax(-1)
    if uniform is None:
        ids = logprobs.argmax(-1)
    elif top_p < 1.0:
        ordered, order = logprobs.sort(-1, descending=True)
        mass = ordered.exp().cumsum(-1)
        # The nucleus is the smallest set with at least top_p of the mass; draw inside it.
        size = (mass < top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
        target = uniform[:, None] * mass.gather(1, size)
        picked = torch.minimum(torch.searchsorted(mass, target, right=True), size)
        ids = order.gather(1, picked).squeeze(1)
    else:
        mass = logprobs.exp().cumsum(-1)
        # Rounding leaves the last entry a little off 1: scale by it, so that every draw lands inside.
        target = uniform[:, None] * mass[:, -1:]
        ids = torch.searchsorted(mass, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return ids, logprobs.gather(1, ids[:, None]).squeeze(1)
