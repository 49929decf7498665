"""Every way a command line ends: exit code, one sentence on stderr, one object on stdout with --json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfctl.cli.exit_codes import STATUS

COMMAND = [sys.executable, "-m", "rlhfctl"]


def ended(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pp"], "No such command 'pp'. Did you mean 'ppo'? (rlhfctl --help)"),
        (["ppo", "--resum"], "No such option: --resum"),
        (["ppo", "--run-dir"], "Option '--run-dir' requires an argument (rlhfctl ppo --help)"),
        (["ppo"], "which recipe? `rlhfctl ppo RECIPE`"),
        (["ppo", "nothing.yaml"], "there is no file and no shipped recipe nothing.yaml"),
        (["ppo", "quickstart/sft"], "run `rlhfctl sft quickstart/sft`"),
        (["ppo", "quickstart/ppo", "optim.lrr=1"], "did you mean optim.lr?"),
        (["ppo", "quickstart/ppo", "optim.lr"], "not KEY=VALUE"),
        (["ppo", "-"], "<stdin>:1:1: the recipe is empty"),
        (["recipes", "sow"], "did you mean show?"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    plain = ended(words, tmp_path)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert said in plain.stderr
    assert plain.stderr.count("\n") == 1
    as_json = ended([words[0], "--json", *words[1:]], tmp_path)
    assert as_json.returncode == 2
    assert as_json.stdout.count("\n") == 1
    told = json.loads(as_json.stdout)
    assert (told["schema"], told["status"], told["exit_code"]) == (1, "invalid", 2)
    assert told["message"] == as_json.stderr.rstrip("\n")
    assert list(tmp_path.iterdir()) == []


def test_recipe_errors_are_listed_in_the_object(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "task: sft\nnaem: x\npolicy: {path: m}\ndata: {train: [{path: d}]}\ntrain: {steps: 0}\n"
    )
    told = json.loads(ended(["sft", "r.yaml", "--json", "seed=x"], tmp_path).stdout)
    assert [(error["file"], error["line"], error["column"], error["key"]) for error in told["errors"]] == [
        ("r.yaml", 1, 1, "name"),
        ("r.yaml", 2, 1, "naem"),
        ("r.yaml", 5, 16, "train.steps"),
        (None, None, None, "seed"),
    ]
    assert told["errors"][1]["suggestion"] == "name"
    assert told["errors"][3]["override"] == "seed=x"


BUG = """
import sys
import rlhfctl.recipe.catalogue as catalogue
def boom(): raise KeyError("boom")
catalogue.shipped_names = boom
from rlhfctl.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def test_a_bug_is_exit_1_one_sentence_and_a_traceback_on_request(tmp_path: Path) -> None:
    def broken(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BUG, "recipes", *words],
            capture_output=True,
            text=True,
            env=env,
            cwd=tmp_path,
        )

    plain = broken("--json")
    assert plain.returncode == 1
    assert plain.stderr == "a bug in rlhfctl: KeyError: 'boom' (-v shows the traceback)\n"
    assert json.loads(plain.stdout)["status"] == "failed"
    for shown in (broken("-v"), broken(RLHFCTL_DEBUG="1")):
        assert shown.returncode == 1
        assert "Traceback" in shown.stderr
        assert shown.stderr.endswith(plain.stderr)


EARLY = """
import builtins, sys
real = builtins.__import__
def stopped(name, *rest):
    if name == "typer":
        raise KeyboardInterrupt
    return real(name, *rest)
builtins.__import__ = stopped
from rlhfctl.__main__ import main
main()
"""


def test_ctrl_c_while_the_command_line_is_imported(tmp_path: Path) -> None:
    words = [sys.executable, "-c", EARLY, "recipes", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "")
    assert json.loads(done.stdout)["status"] == "interrupted"


def test_every_code_of_the_contract_has_its_status() -> None:
    assert STATUS == {
        0: "ok",
        1: "failed",
        2: "invalid",
        3: "mismatch",
        4: "unable",
        5: "refused",
        130: "interrupted",
        143: "interrupted",
    }
