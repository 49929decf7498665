"""The tokens of one trained response with all that was computed for them: for samples.jsonl."""

from typing import Any

from torch import Tensor

from rlhfctl.templates.encode import ChatEncoder
from rlhfctl.templates.response_offsets import response_offsets
from rlhfctl.trainers.experience import Experience


def token_table(experience: Experience, row: int, encoder: ChatEncoder) -> dict[str, Any]:
    """Lists of one entry per response token, in order; see docs/token-rewards.md.

    rewards and advantages are those of the loss; log_ratios are log pi_old - log pi_ref, None without a reference. On
    observation tokens all three are None.
    """
    trajectory = experience.trajectories[row]
    mask = trajectory.mask.tolist()

    def listed(padded: Tensor | None) -> list[float | None] | None:
        if padded is None:
            return None
        values = padded[row, : len(mask)].tolist()
        return [round(value, 6) if mine else None for value, mine in zip(values, mask, strict=True)]

    ratios = None
    if experience.ref_logprobs is not None:
        ratios = experience.old_logprobs - experience.ref_logprobs
    decode = encoder.tokenizer.decode
    return {
        "texts": [decode([token], skip_special_tokens=False) for token in trajectory.response_ids],
        "offsets": [
            list(span) for span in response_offsets(encoder, trajectory.response_ids, trajectory.text)
        ],
        "mask": [int(mine) for mine in mask],
        "rewards": listed(experience.rewards),
        "advantages": listed(experience.advantages),
        "log_ratios": listed(ratios),
    }
