"""What stops a ppo run, or warns: no signal, the KL limit, and the signs of a policy that games its reward (drift.py).

Every rank sees the same global batch and comes to the same end. What is remembered between steps is in the checkpoint.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rlhfctl.errors import RunFailed
from rlhfctl.recipe.tasks import PpoRecipe
from rlhfctl.rewards.build import Source
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.drift import (
    CORRECT,
    CUT,
    EARNED,
    ENTROPY,
    KL,
    LENGTH,
    REWARD,
    Drift,
    Sign,
    Stat,
    of_values,
)
from rlhfctl.trainers.experience import Experience
from rlhfctl.trainers.trajectory import Trajectory

STEPS_WITHOUT_SIGNAL = 20  # consecutive steps with nothing to learn from before the run stops

MEANING = {
    "verifier": "the reward rises while a held-out measure falls: the policy games its reward",
    "format": "the reward rises because answers can be read, and no more of them are right",
    "length": "the reward rises while the length of responses drifts",
    "kl": "the reward rises far away from the reference",
    "entropy": "the entropy has collapsed: samples are all alike and explore nothing",
}
ADVICE = {
    "verifier": "raise algorithm.kl_coef or mend the reward",
    "format": "reward wrong answers less than right ones, or start from a better policy",
    "length": "set reward.shaping.length_penalty or overlong_buffer, or mend the reward",
    "kl": "raise algorithm.kl_coef, lower optim.lr, or set algorithm.kl_limit",
    "entropy": "raise algorithm.entropy_coef or kl_coef, or lower optim.lr",
}


class Watch:
    """held_out: rows of data.eval, 0 without. Raises RunFailed from `check`."""

    def __init__(
        self, ctx: RunContext, recipe: PpoRecipe, sources: Sequence[Source] = (), held_out: int = 0
    ) -> None:
        self.ctx, self.guard = ctx, recipe.guard
        self.limit = recipe.algorithm.kl_limit
        self.held_out = held_out
        self.unweighted = [source.name for source in sources if source.weight == 0]
        self.earned = EARNED if recipe.reward.granularity != "sequence" else REWARD
        self.drift = Drift(recipe.guard, self.earned)
        self.silent_steps = 0
        self.warned: list[str] = []

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"silent_steps": self.silent_steps, "warned": self.warned, "drift": self.drift.state()}

    def restore(self, state: dict[str, Any] | None) -> None:
        if state:
            self.silent_steps, self.warned = state["silent_steps"], list(state["warned"])
            self.drift.restore(state["drift"])

    def check(self, step: int, metrics: dict[str, float], experience: Experience) -> None:
        """After step `step` (1-based) was logged."""
        self._signal(step, metrics, experience)
        self._far(step, metrics)
        found, held_out = series(experience.trajectories, metrics, self.unweighted, self.earned)
        signs = self.drift.look(step, found, held_out) + self.evaluated(step, metrics)
        for sign in signs:
            self._act(step, sign)

    def evaluated(self, step: int, metrics: dict[str, float]) -> list[Sign]:
        """Takes note of an evaluation, where `metrics` has one: greedy answers, so their own measure."""
        rate = metrics.get("eval/accuracy")
        if rate is None or not self.held_out:
            return []
        stat = Stat(float(self.held_out), rate, rate * (1 - rate))
        return self.drift.evaluated(step, "eval/accuracy", stat)

    def _act(self, step: int, sign: Sign) -> None:
        action = getattr(self.guard, sign.kind)
        if action == "stop":
            raise RunFailed(
                f"stopped at step {step}: {MEANING[sign.kind]}: {sign.evidence}; {self._good(sign.good_step)}; "
                f"{ADVICE[sign.kind]} (guard.{sign.kind}: warn goes on)"
            )
        if action == "warn" and sign.kind not in self.warned:
            self.warned.append(sign.kind)
            self.ctx.say(
                f"warning: step {step}: {MEANING[sign.kind]}: {sign.evidence}; {self._good(sign.good_step)}; "
                f"{ADVICE[sign.kind]} (guard.{sign.kind}: stop ends the run there)"
            )

    def _good(self, step: int) -> str:
        kept = self.ctx.run.checkpoint_up_to(step)
        if kept is not None:
            return f"the last good checkpoint is {kept}"
        return f"no checkpoint up to step {step} is there (train.save_every, train.keep_checkpoints)"

    def _signal(self, step: int, metrics: dict[str, float], experience: Experience) -> None:
        cause = no_signal(metrics, experience)
        if cause is None:
            self.silent_steps = 0
            return
        self.silent_steps += 1
        if self.silent_steps == 1:
            self.ctx.say(f"warning: step {step}: {cause}: nothing to learn from in this step")
        if self.silent_steps >= STEPS_WITHOUT_SIGNAL:
            raise RunFailed(
                f"stopped at step {step}: {cause} for {self.silent_steps} steps in a row; "
                f"{self._good(step - self.silent_steps)}; "
                "look at samples.jsonl (train.samples_every=1) and at the reward"
            )

    def _far(self, step: int, metrics: dict[str, float]) -> None:
        drift = metrics.get(KL)
        if self.limit is not None and drift is not None and drift > self.limit:
            raise RunFailed(
                f"stopped at step {step}: kl/reference {drift:.3g} passed algorithm.kl_limit {self.limit:g}; "
                f"{self._good(step - 1)}; raise algorithm.kl_coef or lower optim.lr"
            )
        large = metrics.get("kl/large_fraction", 0.0)
        if large and "large" not in self.warned:
            self.warned.append("large")
            self.ctx.say(
                f"warning: step {step}: {large:.2%} of the sampled tokens are more than 20 nats from the reference: "
                "KL estimates are not clamped, so these tokens alone decide them; raise algorithm.kl_coef or lower "
                "optim.lr"
            )


def series(
    trajectories: Sequence[Trajectory], metrics: dict[str, float], unweighted: Sequence[str], earned: str
) -> tuple[dict[str, Stat], list[str]]:
    """What drift looks at, by the names of the metrics; and which of these are held-out measures.

    earned: what the reward is called, reward/raw or, with the rewards of steps or tokens in it, reward/earned.
    """
    values: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.reward is not None:
            value = trajectory.earned if earned == EARNED else trajectory.reward
            values.setdefault(earned, []).append(value)
        for name in {"correct", "parsable", *unweighted} & set(trajectory.reward_metrics):
            values.setdefault(f"reward/{name}", []).append(trajectory.reward_metrics[name])
    found = {name: of_values(values[name]) for name in sorted(values)}
    found[LENGTH] = of_values(float(len(trajectory.response_ids)) for trajectory in trajectories)
    found[CUT] = of_values(float(trajectory.truncated) for trajectory in trajectories)
    for name in (KL, ENTROPY):
        if name in metrics:
            found[name] = Stat(0.0, metrics[name], 0.0)
    held_out = dict.fromkeys([CORRECT, *(f"reward/{name}" for name in unweighted)])
    return found, [name for name in held_out if name in found]


def no_signal(metrics: dict[str, float], experience: Experience) -> str | None:
    if experience.groups and experience.zero_variance_groups == experience.groups:
        return "all samples of every prompt have the same reward"
    dense = "reward/token_mean" in metrics  # tokens may differ where the scores of responses do not
    if metrics["reward/std"] == 0.0 and not dense and len(experience.trajectories) > 1:
        return f"all rewards are equal ({metrics['reward/mean']:g})"
    if not torch.any(experience.advantages != 0):
        return "all advantages are zero"
    return None
