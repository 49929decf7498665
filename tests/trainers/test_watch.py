from types import SimpleNamespace

import pytest
import torch

from rlhfctl.errors import RunFailed
from rlhfctl.trainers.ppo_metrics import STEPS_WITHOUT_SIGNAL, Watch


def watch(limit=None):
    said = []
    recipe = SimpleNamespace(algorithm=SimpleNamespace(kl_limit=limit))
    return Watch(SimpleNamespace(say=said.append), recipe), said


def experience(groups=0, flat=0, advantage=1.0, samples=4):
    return SimpleNamespace(
        groups=groups,
        zero_variance_groups=flat,
        trajectories=[None] * samples,
        advantages=torch.full((samples, 2), advantage),
    )


def test_equal_rewards_warn_once_then_stop():
    guard, said = watch()
    flat = {"reward/std": 0.0, "reward/mean": 0.1}
    for step in range(1, STEPS_WITHOUT_SIGNAL):
        guard.check(step, flat, experience())
    assert len(said) == 1
    assert "all rewards are equal (0.1)" in said[0]
    with pytest.raises(RunFailed, match=f"for {STEPS_WITHOUT_SIGNAL} steps in a row"):
        guard.check(STEPS_WITHOUT_SIGNAL, flat, experience())


def test_a_step_with_signal_starts_the_count_again():
    guard, said = watch()
    flat, varied = {"reward/std": 0.0, "reward/mean": 0.1}, {"reward/std": 0.5, "reward/mean": 0.1}
    for step in range(5 * STEPS_WITHOUT_SIGNAL):
        guard.check(step, varied if step % 10 == 0 else flat, experience())
    assert len(said) == 10


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (experience(groups=2, flat=2), "all samples of every prompt have the same reward"),
        (experience(advantage=0.0), "all advantages are zero"),
    ],
)
def test_other_causes(seen, cause):
    guard, said = watch()
    guard.check(1, {"reward/std": 0.5, "reward/mean": 0.1}, seen)
    assert cause in said[0]


def test_the_kl_limit_stops_at_once():
    guard, _ = watch(limit=0.5)
    guard.check(1, {"reward/std": 1.0, "kl/reference": 0.5}, experience())
    with pytest.raises(RunFailed, match=r"kl/reference 0\.6 passed algorithm.kl_limit 0\.5"):
        guard.check(2, {"reward/std": 1.0, "kl/reference": 0.6}, experience())
