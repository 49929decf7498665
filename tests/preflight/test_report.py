"""What becomes of a check that fails, and the exit code of several findings."""

from typing import Any

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.run import Report, run_check
from rlhfctl.recipe.tasks import TASKS


def inputs() -> Inputs:
    recipe = {
        "task": "sft",
        "name": "toy",
        "policy": {"path": "m"},
        "data": {"train": [{"path": "d.jsonl"}]},
        "train": {"steps": 4, "batch_size": 8},
    }
    return Inputs(TASKS["sft"].model_validate(recipe), None, False)


def test_one_broken_check_does_not_hide_the_others() -> None:
    def broken(inputs: Inputs) -> Any:
        yield Finding("D004", "info", "found before")
        raise ZeroDivisionError("division by zero")

    found = run_check("data", broken, inputs())
    assert [finding.id for finding in found] == ["D004", "C003"]
    assert "ZeroDivisionError" in found[1].detail
    assert Report(found).exit_code == 1


def test_a_check_that_may_not_look_is_no_bug() -> None:
    def closed(inputs: Inputs) -> Any:
        yield Finding("D004", "info", "found before")
        raise PermissionError(13, "Permission denied", "theirs/model")

    found = run_check("model", closed, inputs())
    assert [finding.id for finding in found] == ["D004", "C002"]
    assert found[1].detail == "theirs/model is closed to this user: permission denied"
    assert Report(found).exit_code == 2


def test_exit_codes_of_several_findings() -> None:
    def finding(exit_code: int, severity: Any = "error", handled: bool = False) -> Finding:
        return Finding("X", severity, "t", exit_code=exit_code, handled=handled)

    assert Report([finding(4), finding(5), finding(3)]).exit_code == 3
    assert Report([finding(4), finding(5)]).exit_code == 5
    assert Report([finding(4), finding(3, handled=True)]).exit_code == 4
    assert Report([finding(3, "warning")]).exit_code == 0
    summary = Report([finding(4), finding(3, handled=True), finding(5, "info")]).as_dict()
    assert summary["summary"] == {"error": 1, "warning": 0, "info": 1, "handled": 1}
    assert (summary["status"], summary["exit_code"], summary["schema"]) == ("unable", 4, 1)
