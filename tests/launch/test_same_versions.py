"""Two nodes with different libraries: which package, which versions, which node."""

import importlib.metadata

import pytest

from rlhfctl.errors import Unable
from rlhfctl.trainers import same_versions
from rlhfctl.trainers.same_versions import difference, versions


def test_the_package_and_the_nodes_are_named() -> None:
    ours = versions()
    assert ours["torch"] == importlib.metadata.version("torch")
    ranks = [("10.0.0.1", ours), ("10.0.0.1", dict(ours)), ("10.0.0.2", {**ours, "transformers": "4.1"})]
    assert difference(ranks[:2]) is None
    assert difference(ranks) == (
        f"the nodes have different versions of transformers: {ours['transformers']} on 10.0.0.1, 4.1 on 10.0.0.2: "
        "install the same on all of them"
    )
    assert "absent on 10.0.0.2" in str(difference([ranks[0], ("10.0.0.2", {**ours, "torch": "absent"})]))


@pytest.mark.parametrize("package", ["rlhfctl", "torch", "transformers", "deepspeed", "peft", "bitsandbytes"])
def test_every_library_that_computes_counts(package: str) -> None:
    ours = versions()
    assert difference([("a", ours), ("b", {**ours, package: "0"})]) is not None


def test_a_library_that_one_node_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_versions, "PACKAGES", ("torch", "no-such-library"))
    assert versions()["no-such-library"] == "absent"


def test_it_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    same_versions.refuse_other_versions()
    monkeypatch.setattr(same_versions, "gather_lists", lambda mine: [*mine, ("b", {"torch": "0"})])
    with pytest.raises(Unable) as told:
        same_versions.refuse_other_versions()
    assert told.value.exit_code == 4
