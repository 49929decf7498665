"""The run directory of a run over several hosts, whether launch.nnodes counts them or a hostfile does."""

from pathlib import Path

import pytest

from rlhfctl.cli.run_rules import leads, new_run
from rlhfctl.errors import UsageError
from rlhfctl.recipe.load import load_recipe

THERE, ABSENT = "127.0.0.1 slots=1", "192.0.2.7 slots=1"


@pytest.mark.parametrize("first", [THERE, ABSENT])
def test_who_leads_may_find_the_logs_of_who_came_first(first: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("\n".join([first, ABSENT if first == THERE else THERE]))
    recipe = load_recipe("quickstart/sft", [f"launch.hostfile={tmp_path / 'hosts'}"]).recipe
    with pytest.raises(UsageError, match="a run over several nodes needs --run-dir"):
        new_run(recipe, None)
    assert leads(recipe) is (first == THERE)
    (tmp_path / "run/logs/node-other").mkdir(parents=True)
    assert new_run(recipe, tmp_path / "run").path == tmp_path / "run"
    (tmp_path / "run/recipe.yaml").write_text("task: sft\n")
    if first == THERE:
        with pytest.raises(UsageError, match="holds a run already"):
            new_run(recipe, tmp_path / "run")
    else:
        assert new_run(recipe, tmp_path / "run").path == tmp_path / "run"


def test_a_hostfile_of_one_host_is_one_machine(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    recipe = load_recipe("quickstart/sft", [f"launch.hostfile={tmp_path / 'hosts'}"]).recipe
    assert new_run(recipe, None).path.name
    (tmp_path / "run/logs").mkdir(parents=True)
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        new_run(recipe, tmp_path / "run")
