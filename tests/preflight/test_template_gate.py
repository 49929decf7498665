"""The gate inside preflight: the recipe's own sides, data and options decide what a finding means."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.preflight import template
from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.run import run_check
from rlhfctl.recipe.tasks import TASKS

QUESTION = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture
def gate(shared: Path, tmp_path: Path) -> Any:
    """(task, policy template, rows, reward model's template or None, recipe sections) -> findings by (side, id)"""

    def side(tokenizer: str, name: str | None) -> str:
        directory = tmp_path / f"{tokenizer}-{name}"
        directory.mkdir(exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_bytes((shared / "tokenizers" / tokenizer / file).read_bytes())
        if name is not None:
            source = (shared / "chat-templates" / f"{name}.jinja").read_text()
            (directory / "chat_template.jinja").write_text(source)
            config = json.loads((directory / "tokenizer_config.json").read_text())
            config.pop("chat_template", None)
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return str(directory)

    def run(task: str, name: str, rows: list, rm: str | None = None, **sections: Any) -> dict:
        data = tmp_path / "d.jsonl"
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
        recipe: dict[str, Any] = {
            "task": task,
            "name": "x",
            "policy": {"path": side("gpt2", name)},
            "data": {"train": [{"path": str(data)}]},
            "train": {"steps": 1},
        }
        if task == "ppo":
            source = (
                {"kind": "model", "path": side("llama-2", rm)}
                if rm
                else {"kind": "verifier", "name": "math_answer"}
            )
            recipe["reward"] = {"sources": [source]}
        for key, value in sections.items():
            recipe[key] = {**recipe.get(key, {}), **value}
        inputs = Inputs(TASKS[task].model_validate(recipe), None, True)
        found: list[Finding] = []
        for check in (template.check, template.check_gate):
            found += run_check("template", check, inputs)
        return {(f.side, f.id): f for f in found}

    return run


def fatal(found: dict) -> set[str]:
    return {id for (_, id), f in found.items() if f.severity == "error" and not f.handled}


def test_a_pair_and_the_template_section(gate: Any) -> None:
    pair = ("ppo", "qwen2.5-7b-instruct", [[QUESTION]], "llama-3-8b-instruct")
    assert fatal(gate(*pair)) == set()
    assert gate(*pair)["pair", "P001"].handled
    closed = gate(*pair, template={"bridge": False})
    assert {"P001", "P003", "P011"} <= fatal(closed)
    assert closed["pair", "P001"].exit_code == 3
    allowed = gate(*pair, template={"bridge": False, "allow": sorted(fatal(closed))})
    assert fatal(allowed) == set()
    assert fatal(gate(*pair, template={"bridge": False, "on_mismatch": "warn"})) == set()


def test_system_messages_count_where_the_data_has_them(gate: Any) -> None:
    pair = ("ppo", "qwen2.5-7b-instruct")
    assert "P007" not in fatal(gate(*pair, [[QUESTION]], "gemma-2-2b-it"))
    assert {"P007", "T010"} <= fatal(gate(*pair, [[SYSTEM, QUESTION]], "gemma-2-2b-it"))
    assert fatal(gate(*pair, [[SYSTEM, QUESTION]], "gemma-2-2b-it", template={"fold_system": True})) == set()


def test_no_bridge_is_fatal(gate: Any) -> None:
    found = gate("ppo", "qwen2.5-7b-instruct", [[QUESTION]], "hermes-3-llama-3.1-8b")
    assert {"P013", "T003"} <= fatal(found)


def test_history_counts_for_sft_on_all_turns(gate: Any) -> None:
    rows = [[QUESTION, ANSWER, QUESTION, ANSWER]]
    assert {"T030", "T031"} <= fatal(gate("sft", "qwen3-0.6b", rows))
    assert fatal(gate("sft", "qwen3-0.6b", rows, data={"train_on": "last_assistant"})) == set()
    assert fatal(gate("sft", "qwen3-0.6b", [[QUESTION, ANSWER]])) == set()
    assert fatal(gate("ppo", "qwen3-0.6b", [[QUESTION, ANSWER, QUESTION]])) == set()


def test_reasoning_that_sft_would_lose(gate: Any) -> None:
    reasoned = [[QUESTION, {"role": "assistant", "content": "<think>\nx\n</think>\n\ny"}]]
    assert "T032" in fatal(gate("sft", "deepseek-r1", reasoned))
    assert fatal(gate("ppo", "deepseek-r1-distill-qwen-32b", [[QUESTION]])) == set()


def test_a_template_without_end_stops_the_gate_and_not_the_machine(gate: Any, tmp_path: Path) -> None:
    hostile = tmp_path / "loop.jinja"
    hostile.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    found = gate("sft", "chatml", [[QUESTION, ANSWER]], policy={"chat_template": str(hostile)})
    assert fatal(found) == {"T003"}
