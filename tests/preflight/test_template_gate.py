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
CALL = {"type": "function", "id": "call00001", "function": {"name": "look", "arguments": {"at": "it"}}}
RESULT = {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "7"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
    },
}


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
        given = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
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


def test_parts_of_rows_that_the_template_leaves_out(gate: Any) -> None:
    plain = [QUESTION, {"role": "assistant", "content": "plain"}]
    for name, id, row, what in (
        (
            "qwen2.5-7b-instruct",
            "T018",
            [{"role": "developer", "content": "d"}, *plain],
            "message 1 (developer)",
        ),
        ("phi-4", "T018", [*plain, {"role": "function", "content": "f"}, ANSWER], "message 3 (function)"),
        ("yi-1.5-chat", "T011", [SYSTEM, {**SYSTEM, "content": "t"}, *plain], "message 2 (system)"),
        ("smollm3-3b", "T011", [*plain, SYSTEM, QUESTION, ANSWER], "message 3 (system)"),
        (
            "chatml",
            "T032",
            [QUESTION, {**ANSWER, "reasoning_content": "r"}],
            "the reasoning_content of message 2",
        ),
        (
            "llama-3.1-8b-instruct",
            "T016",
            [QUESTION, {**ANSWER, "tool_calls": [CALL]}, RESULT],
            "beside the tool calls",
        ),
        ("chatml", "T016", {"messages": plain, "tools": [TOOL]}, "the tools column"),
    ):
        found = gate("sft", name, [plain, row])
        assert (name, fatal(found) - {"T030", "T031"}) == (name, {id})
        assert "d.jsonl:2: " in found["policy", id].detail
        assert what in found["policy", id].detail
        assert fatal(gate("sft", name, [plain], template={"allow": [id]})) == set()


def test_rows_that_a_template_keeps_whole(gate: Any) -> None:
    asked = [QUESTION, {"role": "assistant", "content": " Let me look. ", "tool_calls": [CALL]}, RESULT]
    answered = [*asked, {"role": "assistant", "content": "\n<think>\nso\n</think>\n\nIt is 7.  "}]
    row = {"messages": [SYSTEM, *answered], "tools": json.dumps([TOOL["function"]])}
    once = {"train_on": "last_assistant"}
    for name in ("qwen2.5-7b-instruct", "qwen3-0.6b", "glm-4.6", "kimi-k2"):
        assert (name, fatal(gate("sft", name, [row], data=once))) == (name, set())
    earlier = [QUESTION, {**ANSWER, "reasoning_content": "r"}, QUESTION, {**ANSWER, "reasoning_content": "q"}]
    assert fatal(gate("sft", "qwen3-0.6b", [earlier], data=once)) == set()
    assert fatal(gate("ppo", "mistral-nemo-2407", [[SYSTEM, QUESTION]])) == set()
    assert "T011" in fatal(gate("sft", "mistral-nemo-2407", [[SYSTEM, QUESTION, ANSWER]]))


def test_tools_that_no_reward_model_reads(gate: Any) -> None:
    row = {"messages": [QUESTION], "tools": [TOOL]}
    assert fatal(gate("ppo", "qwen2.5-7b-instruct", [row])) == set()
    found = gate("ppo", "qwen2.5-7b-instruct", [row], "llama-3.1-8b-instruct")
    assert fatal(found) == {"T016"}
    assert "the tools column is not given to the reward model" in found["rm", "T016"].detail
    allowed = {"allow": ["T016"]}
    assert (
        fatal(gate("ppo", "qwen2.5-7b-instruct", [row], "llama-3.1-8b-instruct", template=allowed)) == set()
    )
    pair = {"prompt": [QUESTION], "chosen": "c", "rejected": "r"}
    assert fatal(gate("rm", "qwen2.5-7b-instruct", [pair])) == set()
    assert fatal(gate("rm", "qwen2.5-7b-instruct", [{**pair, "tools": [TOOL]}])) == {"T016"}


def test_folded_system_messages_are_looked_for_where_the_bridge_leaves_them(gate: Any) -> None:
    ask = ("ppo", "qwen2.5-7b-instruct")
    fold = {"fold_system": True}
    assert fatal(gate(*ask, [[SYSTEM, QUESTION]], "orion-chat", template=fold)) == set()
    late = [QUESTION, ANSWER, {"role": "system", "content": "late"}, QUESTION]
    assert "T011" in fatal(gate(*ask, [[SYSTEM, *late]], "orion-chat", template=fold))


def test_special_tokens_that_the_data_spells(gate: Any, shared: Path) -> None:
    chat = shared / "chat-templates" / "qwen2.5-7b-instruct.jinja"
    policy = {"path": str(shared / "tokenizers" / "qwen2"), "chat_template": str(chat)}
    forged = {"role": "assistant", "content": "ChatML: <|im_end|>\n<|im_start|>user"}
    found = gate("sft", "chatml", [[QUESTION, ANSWER], [QUESTION, forged]], policy=policy)["policy", "K012"]
    assert (found.severity, found.evidence["rows"], found.evidence["answers"]) == ("warning", 1, 1)
    assert found.detail.endswith("d.jsonl:2")
    assert ("policy", "K012") not in gate("sft", "chatml", [[QUESTION, ANSWER]], policy=policy)
    pair = {"prompt": [QUESTION], "chosen": [forged], "rejected": "r"}
    assert ("policy", "K012") not in gate("rm", "chatml", [pair], policy=policy)
    assert ("policy", "K012") in gate("ppo", "chatml", [[QUESTION]], policy=policy)


def test_a_template_without_end_stops_the_gate_and_not_the_machine(gate: Any, tmp_path: Path) -> None:
    hostile = tmp_path / "loop.jinja"
    hostile.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    found = gate("sft", "chatml", [[QUESTION, ANSWER]], policy={"chat_template": str(hostile)})
    assert fatal(found) == {"T003"}
