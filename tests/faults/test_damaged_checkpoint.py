"""A checkpoint that a disk or a hand has changed is never trained from: the one before it is, and the run says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfctl.errors import RunFailed
from rlhfctl.launch.same_run import compare_runs
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir, flaw
from rlhfctl.trainers.checkpoint import restore
from rlhfctl.trainers.context import Phase, RunContext

Train = Callable[..., RunDir]


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def test_the_newest_is_damaged(train: Train) -> None:
    whole = train("sft", "whole")
    run = train("sft", "run", stop_after=4)
    newest = run.newest_checkpoint()
    assert newest is not None
    assert (newest.name, flaw(newest)) == ("step_000004", None)
    flip_a_bit(newest / "policy/model.safetensors")  # the size fits: only the bytes tell
    said: list[str] = []
    train("sft", "run", resume=True, said=said)
    assert said[:2] == [
        "step_000004 is damaged (policy/model.safetensors is not what was written: its checksum differs): "
        "it is kept as step_000004.damaged, an older one is used",
        "resuming from step_000002",
    ]
    # Steps 3 and 4 are there once, and step 4's checkpoint was written anew.
    assert [each.where for each in compare_runs(whole, run) if each.difference is not None] == []
    assert flaw(newest) is None
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step_000004",
        "step_000004.damaged",
        "step_000006",
    ]


def test_a_later_phase_without_checkpoints_keeps_what_the_phase_before_logged(tmp_path: Path) -> None:
    """Its start lies in the phase's model: the checkpoints may have been removed for their room."""
    run = RunDir(tmp_path)
    lines = [f'{{"step": {step}}}\n' for step in range(6)]
    for first, kept, told in ((3, 4, "the phase before (step 3)"), (0, 0, "starting at step 0")):
        run.metrics.write_text("".join(lines))
        said: list[str] = []
        recipe = load_recipe("quickstart/sft").recipe
        phase = Phase(2 if first else 1, first, None)
        ctx = RunContext(recipe, run, 0, 1, torch.device("cpu"), True, 2, lambda: None, said.append, phase)
        assert restore(ctx, {}, {}) is None
        assert run.metrics.read_text() == "".join(lines[:kept])
        assert said[0].endswith(told)


def test_all_are_damaged(train: Train) -> None:
    run = train("sft", "run", stop_after=4)
    (run.checkpoints / "step_000004/trainer.json").unlink()
    cut = run.checkpoints / "step_000002/policy.optimizer.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    before = run.metrics.read_text()
    with pytest.raises(RunFailed) as told:
        train("sft", "run", resume=True)
    assert "step_000004: trainer.json: No such file or directory" in told.value.message
    assert "step_000002: policy.optimizer.safetensors has 100 bytes of" in told.value.message
    assert run.metrics.read_text() == before
    assert len(list(run.checkpoints.iterdir())) == 2
