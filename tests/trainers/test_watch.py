from types import SimpleNamespace

import pytest
import torch

from rlhfctl.errors import RunFailed
from rlhfctl.recipe.guard import Guard
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers.drift import Stat
from rlhfctl.trainers.trajectory import Trajectory
from rlhfctl.trainers.watch import STEPS_WITHOUT_SIGNAL, Watch


def watch(tmp_path, limit=None, held_out=0, granularity="sequence", **guard):
    said = []
    reward = SimpleNamespace(granularity=granularity)
    recipe = SimpleNamespace(algorithm=SimpleNamespace(kl_limit=limit), guard=Guard(**guard), reward=reward)
    ctx = SimpleNamespace(say=said.append, run=RunDir(tmp_path))
    sources = [SimpleNamespace(name="judge", weight=0.0), SimpleNamespace(name="model", weight=1.0)]
    return Watch(ctx, recipe, sources, held_out), said


def trajectory(reward, length=4, truncated=False, **metrics):
    return Trajectory(0, "r", [1], [2] * length, torch.zeros(length), truncated, "", reward, reward, metrics)


def experience(groups=0, flat=0, advantage=1.0, samples=4, trajectories=None):
    return SimpleNamespace(
        groups=groups,
        zero_variance_groups=flat,
        trajectories=trajectories or [trajectory(0.0) for _ in range(samples)],
        advantages=torch.full((samples, 2), advantage),
    )


def test_equal_rewards_warn_once_then_stop(tmp_path):
    guard, said = watch(tmp_path)
    flat = {"reward/std": 0.0, "reward/mean": 0.1}
    for step in range(1, STEPS_WITHOUT_SIGNAL):
        guard.check(step, flat, experience())
    assert len(said) == 1
    assert "all rewards are equal (0.1)" in said[0]
    with pytest.raises(RunFailed, match=f"for {STEPS_WITHOUT_SIGNAL} steps in a row"):
        guard.check(STEPS_WITHOUT_SIGNAL, flat, experience())


def test_a_step_with_signal_starts_the_count_again(tmp_path):
    guard, said = watch(tmp_path)
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
def test_other_causes(seen, cause, tmp_path):
    guard, said = watch(tmp_path)
    guard.check(1, {"reward/std": 0.5, "reward/mean": 0.1}, seen)
    assert cause in said[0]


def test_the_kl_limit_stops_at_once(tmp_path):
    guard, _ = watch(tmp_path, limit=0.5)
    guard.check(1, {"reward/std": 1.0, "kl/reference": 0.5}, experience())
    with pytest.raises(RunFailed, match=r"kl/reference 0\.6 passed algorithm.kl_limit 0\.5"):
        guard.check(2, {"reward/std": 1.0, "kl/reference": 0.6}, experience())


def test_tokens_far_from_the_reference_are_told_once(tmp_path):
    guard, said = watch(tmp_path)
    for step in range(1, 4):
        guard.check(step, {"reward/std": 1.0, "kl/large_fraction": 0.0125}, experience())
    assert len(said) == 1
    assert "step 1: 1.25% of the sampled tokens are more than 20 nats from the reference" in said[0]


def gamed(step):
    """64 samples: the reward climbs by half a deviation a step, the judge falls from .5 to 0 after step 3."""
    right = 0.5 if step <= 3 else 0.0
    return experience(
        samples=64,
        trajectories=[
            trajectory((-1.0) ** row + 0.5 * step, judge=float(row < 64 * right), correct=0.25)
            for row in range(64)
        ],
    )


def complete_checkpoint(run, step):
    run.create()
    run.commit_checkpoint(step, lambda directory: (directory / "trainer.json").write_text("{}"))


def test_a_held_out_source_that_falls_stops_the_run_with_numbers_and_the_last_good_checkpoint(tmp_path):
    guard, _ = watch(tmp_path / "run")
    for step in (2, 4):
        complete_checkpoint(guard.ctx.run, step)
    numbers = {"reward/std": 1.0, "reward/mean": 0.0}
    for step in range(1, 5):
        guard.check(step, numbers, gamed(step))
    with pytest.raises(RunFailed) as stopped:
        guard.check(5, numbers, gamed(5))
    said = stopped.value.message
    assert (
        "the policy games its reward: reward/raw 1 -> 1.5 while reward/judge 0.5 -> 0.3 since step 3" in said
    )
    assert f"the last good checkpoint is {tmp_path / 'run/checkpoints/step_000002'}" in said


def gamed_by_steps(step):
    """The same climb in the rewards of steps; the score itself falls with the judge."""
    found = gamed(step)
    for trajectory in found.trajectories:
        judged = trajectory.reward_metrics["judge"]
        trajectory.token_rewards = torch.tensor([trajectory.reward - judged, 0.0, 0.0, 0.0])
        trajectory.reward = judged
    return found


def test_rewards_of_steps_are_part_of_what_rises(tmp_path):
    numbers = {"reward/std": 1.0, "reward/mean": 0.0}
    alone, _ = watch(tmp_path / "alone")
    for step in range(1, 6):
        alone.check(step, numbers, gamed_by_steps(step))  # reward/raw only falls
    guard, _ = watch(tmp_path / "run", granularity="step")
    for step in range(1, 5):
        guard.check(step, numbers, gamed_by_steps(step))
    with pytest.raises(
        RunFailed, match=r"reward/earned 1 -> 1\.5 while reward/judge 0\.5 -> 0\.3 since step 3"
    ):
        guard.check(5, numbers, gamed_by_steps(5))


@pytest.mark.parametrize(("action", "lines"), [("warn", 1), ("off", 0)])
def test_it_may_warn_or_be_off(action, lines, tmp_path):
    guard, said = watch(tmp_path, verifier=action)
    for step in range(1, 9):
        guard.check(step, {"reward/std": 1.0, "reward/mean": 0.0}, gamed(step))
    assert len(said) == lines
    assert all("no checkpoint up to step 3 is there" in line for line in said)


def test_the_last_good_checkpoint_is_from_before_the_first_bad_step(tmp_path):
    guard, _ = watch(tmp_path / "run", limit=0.5)
    for step in (5, 10, 30, 31):
        complete_checkpoint(guard.ctx.run, step)
    flat, varied = {"reward/std": 0.0, "reward/mean": 0.1}, {"reward/std": 0.5, "reward/mean": 0.1}
    for step in range(1, 5 + STEPS_WITHOUT_SIGNAL):
        guard.check(step, varied if step <= 5 else flat, experience())
    with pytest.raises(RunFailed, match=r"the last good checkpoint is .*step_000005"):
        guard.check(5 + STEPS_WITHOUT_SIGNAL, flat, experience())
    with pytest.raises(RunFailed, match=r"the last good checkpoint is .*step_000030"):
        guard.check(31, varied | {"kl/reference": 0.6}, experience())


def test_equal_scores_with_rewards_of_tokens_are_a_signal(tmp_path):
    guard, said = watch(tmp_path)
    guard.check(1, {"reward/std": 0.0, "reward/mean": 0.1, "reward/token_mean": 0.2}, experience())
    assert said == []


def test_an_accuracy_has_the_variance_of_a_share(tmp_path):
    guard, _ = watch(tmp_path, held_out=1000)
    seen = []
    guard.drift = SimpleNamespace(evaluated=lambda *told: seen.append(told) or [])
    assert guard.evaluated(4, {"eval/accuracy": 0.3}) == []
    assert seen == [(4, "eval/accuracy", Stat(1000.0, 0.3, pytest.approx(0.21)))]


def test_accuracy_of_evaluations_is_a_held_out_measure(tmp_path):
    guard, _ = watch(tmp_path, held_out=1000)
    guard.evaluated(0, {"eval/accuracy": 0.3})
    rows = [[trajectory((-1.0) ** row + 0.5 * step) for row in range(64)] for step in range(9)]
    numbers = {"reward/std": 1.0, "reward/mean": 0.0}
    for step in range(1, 8):
        guard.check(step, numbers, experience(samples=64, trajectories=rows[step]))
    with pytest.raises(RunFailed, match=r"reward/raw 0.5 -> 3 while eval/accuracy 0.3 -> 0.1 since step 0"):
        guard.check(8, numbers | {"eval/accuracy": 0.1}, experience(samples=64, trajectories=rows[8]))


def test_a_watch_that_is_restored_goes_on_as_the_one_it_was(tmp_path):
    import json

    whole, _ = watch(tmp_path, length="stop")
    parts, _ = watch(tmp_path, length="stop")
    numbers = {"reward/std": 1.0, "reward/mean": 0.0}
    states = []
    for step in range(1, 5):
        whole.check(step, numbers, gamed(step))
        parts.check(step, numbers, gamed(step))
        states.append((whole.state(), parts.state()))
        text = json.dumps(parts.state())
        parts, _ = watch(tmp_path, length="stop")
        parts.restore(json.loads(text))
    assert all(one == other for one, other in states)
    for each in (whole, parts):
        with pytest.raises(RunFailed, match="since step 3"):
            each.check(5, numbers, gamed(5))
