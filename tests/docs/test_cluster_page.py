"""docs/cluster.md: the launch lines hold keys that exist and agree."""

import re
from pathlib import Path

from rlhfctl.recipe.load import load_recipe


def test_the_keys_of_the_launch_lines_apply(repo: Path) -> None:
    page = (repo / "docs/cluster.md").read_text()
    lines = re.findall(r'^keys="(.*)"$', page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        line = line.replace("$SLURM_NNODES", "2").replace("$head", "10.0.0.1")
        assert "$" not in line
        launch = load_recipe("quickstart/ppo", line.split()).recipe.launch
        assert (launch.nnodes, launch.rdzv_endpoint, launch.max_restarts) == (2, "10.0.0.1:29400", 3)


def test_the_keys_of_the_table_exist(repo: Path) -> None:
    page = (repo / "docs/cluster.md").read_text()
    keys = re.findall(r"^\| `(launch\.\w+=[^`]+)` \|", page, re.MULTILINE)
    assert len(keys) == 6
    keys = [key.replace("HOST:PORT", "h:1") for key in keys if not key.startswith("launch.max_restarts")]
    assert load_recipe("quickstart/ppo", keys).recipe.launch.node_rank == 0
