"""The comparison behind `doctor --verify-resume`: equal runs are equal, a broken resume is told by step and name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhfctl.cli.doctor import two_counts
from rlhfctl.errors import UsageError
from rlhfctl.launch.same_run import compare_runs, compare_tensors
from rlhfctl.launch.verify_resume import kept_or_temporary, killed_after, short
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.tracking.metrics import append_jsonl

Train = Callable[..., RunDir]


def test_a_resume_that_lost_its_optimizer_is_caught(train: Train) -> None:
    whole = train("sft", "whole")
    train("sft", "good", stop_after=4)
    good = train("sft", "good", resume=True)
    found = compare_runs(whole, good)
    assert all(each.difference is None for each in found)
    assert [each.what for each in found] == [
        "metrics.jsonl",
        "checkpoints/step_000006/policy/model.safetensors",
        "checkpoints/step_000006/policy.optimizer.safetensors",
        "checkpoints/step_000006/trainer.json",
        "final/model.safetensors",
    ]
    assert found[0].counted == "6 lines, 36 values"

    broken = train("sft", "broken", stop_after=4)
    file = broken.checkpoints / "step_000004/policy.optimizer.safetensors"
    state = load_file(file)
    # Same names, shapes and sizes: nothing but the numbers tells.
    save_file({key: t * 0 if key.endswith("exp_avg") else t for key, t in state.items()}, file)
    forget_checksums(broken)
    broken = train("sft", "broken", resume=True)
    metrics, *tensors = compare_runs(whole, broken)
    # The loss of step 5 is that of the restored weights; what the lost moment changes shows one step later.
    assert (metrics.step, metrics.key) == (6, "loss/sft")
    assert "uninterrupted" in metrics.where
    assert all(each.difference is not None for each in tensors if each.what.endswith(".safetensors"))
    assert tensors[0].key == "lm_head.weight"


def forget_checksums(run: RunDir) -> None:
    for manifest in run.checkpoints.glob("*/manifest.json"):
        text = manifest.read_text()
        manifest.write_text(text.replace('"crc32"', '"not_crc32"'))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_the_first_element_that_differs(dtype: torch.dtype, tmp_path: Path) -> None:
    ours = {"a": torch.arange(600_000).remainder(100).to(dtype), "b": torch.ones(3, dtype=dtype)}
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    save_file(ours, tmp_path / "ours")
    save_file(theirs, tmp_path / "same")
    assert compare_tensors(tmp_path / "ours", tmp_path / "same").difference is None
    theirs["a"][500_001] = 77
    save_file(theirs, tmp_path / "theirs")
    found = compare_tensors(tmp_path / "ours", tmp_path / "theirs")
    one, other = ("1", "77") if dtype == torch.int64 else ("1.0", "77.0")
    assert (found.key, found.difference) == ("a", f"element 500001: {one} uninterrupted, {other} resumed")
    save_file({"a": ours["a"]}, tmp_path / "less")
    found = compare_tensors(tmp_path / "ours", tmp_path / "less")
    assert (found.key, found.difference) == ("b", "only in the uninterrupted run")
    assert "has no such file" in str(compare_tensors(tmp_path / "ours", tmp_path / "absent").difference)


def test_lines_that_are_missing_or_differ_in_the_last_digit(tmp_path: Path) -> None:
    runs = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    for run in runs:
        run.create()
    rows = ['{"step": 1, "loss": 0.1, "seconds/step": 3}\n', '{"step": 2, "loss": NaN, "seconds/step": 4}\n']
    runs[0].metrics.write_text("".join(rows))
    runs[1].metrics.write_text("".join(rows).replace("4}", "5}"))
    assert compare_runs(*runs)[0].difference is None
    runs[1].metrics.write_text(rows[0].replace("0.1", "0.10000000000000002") + rows[1])
    found = compare_runs(*runs)[0]
    assert found.where == "step 1, loss: 0.1 uninterrupted, 0.10000000000000002 resumed"
    runs[1].metrics.write_text(rows[0])
    assert compare_runs(*runs)[0].where == "step 2, step: 2 lines uninterrupted, 1 resumed"


def test_a_response_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    runs = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    for run, other in zip(runs, ("two\u2028", "two\u0085"), strict=True):
        run.create()
        append_jsonl(run.samples, {"step": 1, "response": "one\u2028\u0085"})
        append_jsonl(run.samples, {"step": 2, "response": other})
    found = compare_runs(*runs)[1]
    assert (found.step, found.key, found.counted) == (2, "response", "2 lines")


def test_the_recipe_is_bounded_and_each_phase_is_killed() -> None:
    ppo = load_recipe("quickstart/ppo").recipe
    bounded = short(ppo, 3, 2)
    assert (bounded.train.steps, bounded.train.save_every, bounded.train.eval_samples) == (5, 3, 16)
    assert killed_after(bounded, 3, 2) == [3]
    oreo = short(load_recipe("quickstart/oreo").recipe, 3, 2)
    assert oreo.algorithm.value_warmup_steps == 2  # type: ignore[union-attr]
    reft = short(load_recipe("quickstart/reft").recipe, 3, 2)
    assert reft.warmup.steps == 5  # type: ignore[union-attr]
    assert killed_after(reft, 3, 2) == [3, 6]
    assert killed_after(short(load_recipe("quickstart/reft").recipe, 2, 2), 2, 2) == [2, 6]
    rounds = short(load_recipe("quickstart/oreo-rounds").recipe, 2, 2)
    assert killed_after(rounds, 2, 2) == [2, 6, 10]
    assert (rounds.data.train[0].limit, rounds.value_fit.steps) == (64, 4)  # type: ignore[union-attr]
    assert killed_after(rounds, 1, 3) == [1, 5, 9]


@pytest.mark.parametrize("text", ["3", "0,1", "2,2,2", "a,b", "2,-1"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="give two counts from 1"):
        two_counts(text)


def test_a_used_directory_is_not_kept_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="is not an empty directory"), kept_or_temporary(place):
            raise AssertionError("it was used")
    with kept_or_temporary(tmp_path / "new") as directory:
        assert directory.is_dir()
