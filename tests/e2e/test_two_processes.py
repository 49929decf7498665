"""Two gloo processes train what one process trains."""

import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize(("task", "steps"), [("sft", 6), ("rm", 3), ("ppo", 3)])
def test_two_processes_equal_one(task, steps, workspace, command, cli, metrics, tmp_path):
    """ppo: 12 optimizer steps. Sums in another order differ by 4e-9 after the first and grow from there, because
    AdamW divides small gradients by their own size; a wrong normaliser or a lost row shows at once."""
    cli(*command(task, tmp_path / "one", {"train.steps": steps}), cwd=workspace)
    ranks = {"launch.launcher": "torchrun", "launch.nproc_per_node": 2, "train.steps": steps}
    cli(*command(task, tmp_path / "two", ranks), cwd=workspace)
    assert (tmp_path / "two/logs/latest/rank1.log").exists()
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [record["step"] for record in one] == list(range(1, steps + 1))
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
