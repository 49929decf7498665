"""recipes list, show and schema."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.cli.main import run
from rlhfctl.recipe.catalogue import shipped_names, shipped_path
from rlhfctl.recipe.load import load_recipe

Cli = Callable[..., Any]


def test_list(cli: Cli) -> None:
    listed = cli("recipes")
    assert [line.split()[0] for line in listed.out.splitlines()] == shipped_names()
    assert cli("recipes", "list").out == listed.out
    assert listed.err == ""
    rows = cli("recipes", "--json").object["recipes"]
    assert [row["name"] for row in rows] == shipped_names()
    assert {row["task"] for row in rows} == {"sft", "rm", "ppo", "reft", "oreo"}


def test_show_is_the_file_itself_and_runs_as_a_recipe(cli: Cli) -> None:
    path = shipped_path("quickstart/ppo")
    assert path is not None
    shown = cli("recipes", "show", "quickstart/ppo")
    modeline, rest = shown.out.split("\n", 1)
    assert rest == path.read_text().split("\n", 1)[1]
    assert Path(
        modeline.removeprefix("# yaml-language-server: $schema=")
    ).is_file()  # also of a copy anywhere
    piped = cli("ppo", "-", "--dry-run", stdin=shown.out)
    assert piped.out == cli("ppo", "quickstart/ppo", "--dry-run").out
    assert cli("recipes", "show", "quickstart/ppo", "--json").object["text"] == shown.out


ABSENT = [
    "gsm8k/sft-7b-zero2", "gsm8k/cross-family", "gsm8k/grpo-7b-lora-2-nodes", "gsm8k/remote-rm", "gsm8k/oreo-0.5b",
    "quickstart/reft", "quickstart/oreo-rounds", "quickstart/rm", "stories/against-rm",
]  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_a_shipped_recipe_dry_runs_where_its_model_and_data_are_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with findings that say what is missing, never by a crash of a check. The command in this process: what
    its start costs is measured elsewhere."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        recipe = load_recipe(name).recipe
        several = ["--run-dir", "run"] if recipe.launch.nnodes > 1 else []
        code = run([recipe.task, name, "--dry-run", "--json", *several])
    finally:
        signal.signal(signal.SIGTERM, before)
    told = json.loads(capsys.readouterr().out)
    assert code == told["exit_code"] in (4, 5)
    assert told["recipe"]["name"] == name.replace("/", "-")
    assert "C003" not in {finding["id"] for finding in told["findings"]}
    wrong = [finding for finding in told["findings"] if finding["severity"] == "error"]
    assert {"W001", "W002"} & {finding["id"] for finding in wrong}
    assert all(finding["fix"] for finding in wrong)
    assert [path.name for path in tmp_path.rglob("*")] == (["run", "preflight.json"] if several else [])


def test_schema(cli: Cli) -> None:
    schema = json.loads(cli("recipes", "schema", "ppo").out)
    assert schema["properties"]["algorithm"]["$ref"] == "#/$defs/Algorithm"
    assert cli("recipes", "schema", "sft", "--json").object["json_schema"]["title"] == "rlhfctl sft recipe"


def test_mistakes(cli: Cli) -> None:
    for args, said in [
        (["shwo"], "did you mean show?"),
        (["show"], "which one?"),
        (["show", "quickstart/pppo"], "did you mean quickstart/ppo?"),
        (["schema"], "of which task?"),
        (["schema", "dpo"], "there is no task dpo"),
        (["list", "quickstart/ppo"], "takes no name"),
    ]:
        ended = cli("recipes", *args)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err
        assert ended.err.count("\n") == 1
