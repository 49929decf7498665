"""Hostfiles: what they stand for, and every way to get one wrong."""

from pathlib import Path

import pytest

from rlhfctl.errors import Unable, UsageError
from rlhfctl.preflight.hostfile import expanded, read_hosts, unreachable
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.machine import network_findings, world_size
from rlhfctl.recipe.load import load_recipe
from rlhfctl.recipe.sections import Launch


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hosts"
    path.write_text(text)
    return str(path)


def test_one_host_is_one_node(tmp_path: Path) -> None:
    path = write(tmp_path, "# mine\n\nlocalhost slots=3  # all of it\n")
    launch = expanded(Launch(hostfile=path))
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_endpoint, launch.node_rank) == (
        1,
        3,
        None,
        None,
    )


def test_this_machine_finds_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "192.0.2.7 slots=2\n127.0.0.1 slots=2\n")
    launch = expanded(Launch(hostfile=path, launcher="deepspeed"))
    assert (launch.nnodes, launch.nproc_per_node, launch.node_rank) == (2, 2, 1)
    assert launch.rdzv_endpoint == "192.0.2.7:29400"
    assert expanded(Launch(hostfile=path, launcher="torchrun", rdzv_endpoint="b:1")).node_rank is None


def test_a_machine_that_is_none_of_the_hosts(tmp_path: Path) -> None:
    path = write(tmp_path, "192.0.2.7 slots=2\n192.0.2.8 slots=2\n")
    with pytest.raises(Unable, match=r"is none of 192\.0\.2\.7, 192\.0\.2\.8"):
        expanded(Launch(hostfile=path, launcher="deepspeed"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slot=2\n", r"hosts:1: a line of a hostfile is `HOST slots=N`, not 'a slot=2'"),
        ("a slots=2\nb\n", "hosts:2: a line of a hostfile"),
        ("a slots=0\n", "hosts:1: a has no slots"),
        ("a slots=2\na slots=2\n", "hosts:2: a stands there twice"),
        ("a slots=2\nb slots=1\n", "b has 1 slots, a 2: all hosts must have equally many"),
        ("# nobody\n", "names no host"),
    ],
)
def test_hostfiles_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_hosts(write(tmp_path, text))


def test_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_hosts(str(tmp_path / "absent"))


def test_hosts_that_cannot_be_reached_refuse_the_run(tmp_path: Path) -> None:
    """Loopback refuses connections, which is an answer; .invalid is a name that never resolves (RFC 2606)."""
    assert unreachable("127.0.0.1", 1) is None
    path = write(tmp_path, "127.0.0.1 slots=2\nnode7.invalid slots=2\n")
    recipe = load_recipe("quickstart/sft", [f"launch.hostfile={path}"]).recipe
    found = network_findings(Inputs(recipe, None, True))
    assert [(finding.id, finding.exit_code) for finding in found] == [("X032", 4)]
    assert "node7.invalid cannot be reached: its name cannot be resolved" in found[0].title
    assert world_size(Inputs(recipe, None, True)) == 4
