"""The proof of a weight sync: a fixed prompt scored by the trainer and by the sampler.

max_t |log p_trainer(x_t | x_<t) - log p_sampler(x_t | x_<t)| over T - 1 tokens, in nats, at temperature 1.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhfctl.errors import RunFailed
from rlhfctl.models.head import token_logprobs
from rlhfctl.models.linear import shape_bucket
from rlhfctl.models.load import backbone, head_weight, hidden_at_predictors
from rlhfctl.models.packing import pack

# How a forward pass of the policy is made: of weights in parts (ZeRO-3) all ranks make it together.
Run = Callable[[Callable[[], Tensor]], Tensor]
LENGTH = 32
# Two kernels round differently: float32 differs by some 1e-6, bfloat16 by its 8 bits of a logit.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.25}


def canary_ids(vocabulary: int) -> list[int]:
    """Ids spread over the vocabulary, the same in every run."""
    return [place * 2654435761 % 2**32 % vocabulary for place in range(1, LENGTH + 1)]


def directly(forward: Callable[[], Tensor]) -> Tensor:
    return forward()


@torch.no_grad()
def trainer_logprobs(policy: nn.Module, ids: list[int], run: Run = directly) -> Tensor:
    """[T - 1] float32 log-probabilities of ids[1:] by the policy as it is trained, adapters on."""
    weight = head_weight(policy)
    bucket = shape_bucket(weight.dtype, weight.device)
    batch = pack([0], [ids], [range(1, len(ids))], weight.device, bucket)

    def forward() -> Tensor:
        hidden = hidden_at_predictors(backbone(policy), batch)
        return token_logprobs(hidden, head_weight(policy), batch.targets, 1.0, with_entropy=False)[0]

    return run(forward).float().cpu()


def compare(
    policy: nn.Module, ids: list[int], sampled: Sequence[float], step: int, run: Run = directly
) -> float:
    """The largest difference. Raises RunFailed past the tolerance of the policy's number format."""
    return difference(trainer_logprobs(policy, ids, run), head_weight(policy).dtype, sampled, step)


def difference(wanted: Tensor, dtype: torch.dtype, sampled: Sequence[float], step: int) -> float:
    """As compare; wanted: what the trainer gives, in the policy's dtype."""
    found = torch.tensor(sampled, dtype=torch.float32)
    gaps = (wanted - found).abs().nan_to_num(nan=float("inf"))
    worst = int(gaps.argmax())
    gap, tolerance = float(gaps[worst]), TOLERANCES[dtype]
    if gap > tolerance:
        raise RunFailed(
            f"stopped at step {step}: after the weight sync the sampler gives token {worst + 1} of the canary prompt "
            f"log-probability {float(found[worst]):.6f}, the trainer {float(wanted[worst]):.6f}: a difference of "
            f"{gap:.3g}, {tolerance:g} allowed; it samples from other weights, so nothing more is trained"
        )
    return gap
