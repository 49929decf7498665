"""Two gloo processes train what one process trains."""

import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize("task", ["sft", "ppo"])
def test_two_processes_equal_one(task, workspace, command, cli, metrics, tmp_path):
    cli(*command(task, tmp_path / "one"), cwd=workspace)
    ranks = {"launch.launcher": "torchrun", "launch.nproc_per_node": 2}
    cli(*command(task, tmp_path / "two", ranks), cwd=workspace)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [record["step"] for record in one] == [1, 2, 3, 4, 5, 6]
    for alone, together in zip(one, two, strict=True):
        assert set(alone) == set(together)
        for name in [name for name in alone if name.startswith("loss/")]:
            assert together[name] == pytest.approx(alone[name], abs=1e-6), name
        if task == "ppo":
            # The same tokens were sampled: rewards and lengths are equal to the last bit.
            for name in ("reward/mean", "reward/std", "length/response", "tokens"):
                assert together[name] == alone[name], name
            assert alone["kl/rollout"] < 1e-6
            assert together["kl/rollout"] < 1e-6
    first = load_file(tmp_path / "one/final/model.safetensors")
    second = load_file(tmp_path / "two/final/model.safetensors")
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().max()) < 1e-3, name
