"""What samples responses: one interface, whether the trainer's own module does it or a server elsewhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from rlhfctl.architectures import longest_row
from rlhfctl.models.load import config_of
from rlhfctl.recipe.sections import Rollout as RolloutSpec
from rlhfctl.rollout import hf
from rlhfctl.rollout.canary import Run, directly
from rlhfctl.rollout.types import Request, Rollout, Sampling


class Engine(Protocol):
    """Every rank has one; what it is asked for is that rank's share."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One response per request, in the order of the requests, sampled from the weights of the last sync.

        A sample is a function of those weights, its prompt and (seed, step, index). Raises RunFailed.
        """
        ...

    def sync(self, policy: nn.Module, step: int, run: Run = directly) -> dict[str, float]:
        """Take over the policy's weights as they are after `step` steps, and prove it; returns metrics.

        Called by every rank: before the first generate and after each phase of optimizer steps. Weights in parts
        (ZeRO-3) are gathered a bucket at a time, and run makes the forward pass of the proof. Raises RunFailed.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; called once, after the run's last collective."""
        ...


class HfEngine:
    """The trainer's process generates, with the policy's weights as they are at every call.

    say: takes one line where it is the module that decodes, not rollout/decode.py.
    """

    def __init__(self, policy: nn.Module, say: Callable[[str], None] | None = None) -> None:
        self.policy = policy
        reason = hf.uncovered(policy)
        if reason is not None and say is not None:
            say(f"rollouts decode with the model's own module, more slowly: {reason}")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        return hf.generate(self.policy, requests, sampling)

    def sync(self, policy: nn.Module, step: int, run: Run = directly) -> dict[str, float]:
        self.policy = policy
        return {"rollout/static_cache": float(hf.uncovered(policy) is None)}

    def close(self) -> None:
        del self.policy


def build_engine(
    spec: RolloutSpec,
    policy: nn.Module,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    logs: Path | None = None,
    say: Callable[[str], None] = print,
) -> Engine:
    """The recipe's engine, with weights that only its first sync vouches for.

    max_length: the longest prompt and response together, at most and by default the model's context. logs: where
    servers that are started write theirs. say: takes one line when a server is lost. Raises Unable, Refused.
    """
    if spec.engine == "hf":
        return HfEngine(policy, say)
    longest = within_context(policy, max_length)
    if spec.engine == "vllm_server":
        from rlhfctl.rollout.vllm_server import VllmServerEngine

        return VllmServerEngine(
            spec.server, policy, longest, spec.max_batch_tokens, trust_remote_code, logs, say
        )
    from rlhfctl.rollout.vllm import VllmEngine

    return VllmEngine(policy, longest, spec.max_batch_tokens, trust_remote_code)


def within_context(policy: nn.Module, length: int | None) -> int:
    """vLLM refuses more than the model's context, and no row that preflight lets pass needs more."""
    config = config_of(policy)
    context = longest_row(config.to_dict()) or int(config.max_position_embeddings)
    return min(length or context, context)
