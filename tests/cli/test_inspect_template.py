"""inspect-template from outside: report, JSON, exit codes, recipes, bad input, speed, and the base install."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pace import assert_within

CLOCK = ("--clock", "2025-01-15")


@pytest.fixture
def corpus(shared: Path) -> dict[str, tuple[str, str]]:
    """name -> (template file, tokens as JSON)"""
    folder = shared / "chat-templates"
    entries = json.loads((folder / "index.json").read_text())["templates"]
    result = {}
    for entry in entries:
        tokens = dict(entry["tokens"])
        if entry["tokenizer_adds_bos"] is not None:
            tokens["adds_bos"] = entry["tokenizer_adds_bos"]
        result[entry["name"]] = (str(folder / entry["file"]), json.dumps(tokens))
    return result


def bare(corpus: dict, policy: str, rm: str | None = None) -> list[str]:
    file, tokens = corpus[policy]
    args = [file, "--policy-tokens", tokens]
    if rm is not None:
        file, tokens = corpus[rm]
        args = [args[0], file, *args[1:], "--rm-tokens", tokens]
    return args


def ids(report: dict[str, Any], side: str) -> set[str]:
    return {found["id"] for found in report["findings"] if found["side"] == side}


def test_pairs_through_the_command(cli: Any, corpus: dict, shared: Path, tmp_path: Path) -> None:
    pairs = json.loads((shared / "chat-templates" / "pairs.json").read_text())["pairs"]
    for pair in pairs[::13]:
        expected = pair["expected_renders"]
        (tmp_path / "m.json").write_text(json.dumps(expected["messages"]))
        done = cli(
            "inspect-template",
            *bare(corpus, pair["policy"], pair["rm"]),
            *CLOCK,
            "--messages",
            "m.json",
            "--json",
        )
        report = done.object
        assert done.code == (3 if pair["worst"] == "error" else 0)
        assert report["status"] == ("mismatch" if done.code else "ok")
        for side in ("policy", "rm", "pair"):
            assert set(pair["must"][side]) <= ids(report, side)
            assert not set(pair["must_not"][side]) & ids(report, side)
        assert report["renders"] == {"policy": expected["policy"], "rm": expected["rm"]}
        assert {"policy", "reward_model", "findings", "bridge", "renders", "summary"} <= set(report)


def test_terminal_report(cli: Any, shared: Path) -> None:
    policy, rm = shared / "tokenizers" / "qwen2", shared / "tokenizers" / "llama-3-8b-instruct"
    done = cli("inspect-template", str(policy), str(rm), *CLOCK, "--render")
    lines = done.out.splitlines()
    assert done.code == 3
    (p001,) = [line for line in lines if line.startswith("error") and " P001 " in line]
    assert "fix: " in p001
    assert "docs/templates.md#p001" in p001
    place = lines.index("first difference, at character 2:")
    left, right, marker = lines[place + 1 : place + 4]
    column = marker.index("^")
    assert left[:column].replace("policy", "rm    ") == right[:column]
    assert left[column] != right[column]
    assert "\\n" in left
    assert "bridge: re-render" in lines
    assert any("\u00ab<|im_start|>\u00bbsystem" in line and "|" in line for line in lines)
    assert any(
        "tokens of the policy's render" in line and "in the reward model's vocabulary" in line
        for line in lines
    )
    assert done.err == ""


def test_one_side_alone(cli: Any, shared: Path) -> None:
    done = cli("inspect-template", str(shared / "models" / "stories260k"), "--json")
    assert done.code == 0
    assert done.object["reward_model"] is None
    assert done.object["bridge"] is None
    assert done.object["policy"]["embedding_rows"] == 512
    assert cli("inspect-template", str(shared / "models" / "stories260k"), "--strict").code == 3


def test_bridge_flags(cli: Any, corpus: dict) -> None:
    gemma = bare(corpus, "qwen2.5-7b-instruct", "gemma-2-2b-it")
    assert cli("inspect-template", *gemma, *CLOCK, "--bridge").code == 3
    done = cli("inspect-template", *gemma, *CLOCK, "--bridge", "--fold-system", "--json")
    assert done.code == 0
    assert done.object["bridge"]["mode"] == "re-render+fold-system"
    assert done.object["summary"]["handled"] >= 3
    assert {f["id"] for f in done.object["findings"] if f["handled"]} >= {"P001", "P007", "P011"}


def rows(path: Path, *conversations: list[dict]) -> str:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


def test_data_weighs_findings(cli: Any, corpus: dict, tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    plain = rows(tmp_path / "plain.jsonl", [question, answer])
    several = rows(tmp_path / "several.jsonl", [question, answer], [question, answer, question, answer])
    system = rows(tmp_path / "system.jsonl", [{"role": "system", "content": "s"}, question, answer])

    def severities(name: str, *args: str) -> dict[str, str]:
        done = cli("inspect-template", *bare(corpus, name), *CLOCK, "--json", *args)
        return {found["id"]: found["severity"] for found in done.object["findings"]}

    assert severities("qwen3-0.6b")["T031"] == "warning"
    assert severities("qwen3-0.6b", "--data", plain)["T031"] == "warning"
    assert severities("qwen3-0.6b", "--data", several)["T031"] == "error"
    assert severities("gemma-2-2b-it", "--data", plain)["T010"] == "warning"
    assert severities("gemma-2-2b-it", "--data", system)["T010"] == "error"
    assert severities("orion-chat")["T011"] == "error"
    assert severities("orion-chat", "--data", plain)["T011"] == "warning"


def test_a_recipe_gives_both_sides(cli: Any, shared: Path, tmp_path: Path) -> None:
    rows(tmp_path / "d.jsonl", [{"role": "user", "content": "a"}])
    recipe = f"""task: ppo
name: x
policy: {{path: {shared}/tokenizers/qwen2}}
data: {{train: [{{path: d.jsonl}}]}}
train: {{steps: 1}}
reward: {{sources: [{{kind: model, path: {shared}/tokenizers/llama-3-8b-instruct}}]}}
"""
    (tmp_path / "r.yaml").write_text(recipe)
    done = cli("inspect-template", "r.yaml", "--json")
    assert done.code == 0, done.err
    assert done.object["bridge"]["mode"] == "re-render"
    (tmp_path / "off.yaml").write_text(recipe + "template: {bridge: false}\n")
    assert cli("inspect-template", "off.yaml").code == 3
    (tmp_path / "warn.yaml").write_text(recipe + "template: {bridge: false, on_mismatch: warn}\n")
    assert cli("inspect-template", "warn.yaml").code == 0
    both = recipe.replace(
        "[{kind: model,", f"[{{kind: model, path: {shared}/tokenizers/qwen2}}, {{kind: model,"
    )
    (tmp_path / "two.yaml").write_text(both + "template: {bridge: false}\n")
    two = cli("inspect-template", "two.yaml", "--json")
    assert (two.code, [pair["exit_code"] for pair in two.object["pairs"]]) == (3, [0, 3])
    assert "P001" in {found["id"] for found in two.object["findings"]}, "found with the second alone"
    assert two.object["summary"]["error"] == two.object["pairs"][1]["summary"]["error"]
    refused = cli("inspect-template", "r.yaml", "--bridge")
    assert refused.code == 2
    assert "leave --bridge out" in refused.err


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        ([], 2, "inspect which policy?"),
        (["nothing/here.jinja"], 2, "does not exist"),
        (["no/such/dir/at/all"], 2, "does not exist"),
        (["org/model-nobody-has"], 2, "HF_HUB_OFFLINE is set, and it is not in the local cache"),
        (["org/model-nobody-has"], 2, "unset it, or give a local directory"),
        (["empty"], 2, "is not a model or tokenizer directory"),
        (["notes.txt"], 2, "is a file; give a model or tokenizer directory"),
        (["binary.jinja"], 2, "is not UTF-8 text"),
        (["ok.jinja", "--policy-tokens", "{"], 2, "--policy-tokens is not JSON"),
        (["ok.jinja", "--policy-tokens", '{"boss": "x"}'], 2, "unknown key 'boss'"),
        (["ok.jinja", "--policy-tokens", '{"bos": 1}'], 2, "bos is 1"),
        (["ok.jinja", "--policy-tokens", '{"eos": "a", "eos": "b"}'], 2, "--policy-tokens gives eos twice"),
        (["ok.jinja", "--render", "--messages", "half.json"], 2, "message 1 holds half of a surrogate pair"),
        (["ok.jinja", "--clock", "yesterday"], 2, "is no date"),
        (["ok.jinja", "--messages", "notes.txt"], 2, "is not JSON"),
        (["ok.jinja", "--messages", "numbers.json"], 2, "message 1 is not an object with a role"),
        (["ok.jinja", "--data", "absent.jsonl"], 2, "no such data file"),
        (["ok.jinja", "--rm-template", "ok.jinja"], 2, "there is none"),
        (["ok.gguf"], 2, "is not a readable GGUF file"),
        (["broken"], 2, "tokenizer_config.json:1:2 is not JSON"),
        (["damaged"], 2, "is not a readable tokenizer"),
        (["syntax.jinja"], 3, "T002"),
        (["needs.jinja"], 3, "T003"),
        (["loop.jinja"], 3, "T003"),
        (["recursive.jinja"], 3, "T003"),
        (["untemplated"], 3, "T001"),
        (["nodefault"], 3, "none of them is called default"),
        (["two"], 3, "T004"),
    ],
)
def test_bad_input(cli: Any, shared: Path, tmp_path: Path, args: list[str], code: int, sentence: str) -> None:
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "ok.jinja").write_text(text)
    (tmp_path / "syntax.jinja").write_text("{% for m in messages %}{{ m.content }}")
    (tmp_path / "needs.jinja").write_text("{{ functions['a'].b }}" + text)
    (tmp_path / "loop.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    (tmp_path / "recursive.jinja").write_text("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    (tmp_path / "half.json").write_text('[{"role": "user", "content": "half: \\ud83d"}]')
    (tmp_path / "ok.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    config = json.loads((shared / "tokenizers" / "gpt2" / "tokenizer_config.json").read_text())
    named = [{"name": "rag", "template": text}, {"name": "tool_use", "template": text}]
    for name, value in (
        ("untemplated", config),
        ("nodefault", {**config, "chat_template": named}),
        ("two", {**config, "chat_template": text}),
        ("damaged", {**config, "chat_template": text}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(value))
        tokenizer = (
            b"{}" if name == "damaged" else (shared / "tokenizers" / "gpt2" / "tokenizer.json").read_bytes()
        )
        (tmp_path / name / "tokenizer.json").write_bytes(tokenizer)
    (tmp_path / "two" / "chat_template.jinja").write_text(text + "!")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text("{,}")

    done = cli("inspect-template", *args)
    assert done.code == code, done.out + done.err
    assert sentence in done.out + done.err
    assert len(done.err.splitlines()) == (1 if code == 2 else 0)
    assert cli("inspect-template", *args, "--json").object["exit_code"] == code


@pytest.mark.timed
def test_speed_on_two_real_tokenizers(cli: Any, shared: Path) -> None:
    sides = [str(shared / "tokenizers" / name) for name in ("qwen2", "llama-3-8b-instruct")]
    assert_within(1.0, lambda: cli("inspect-template", *sides, "--json").cpu)


BASE_ONLY = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        heavy = {"torch", "transformers", "numpy", "datasets", "pyarrow", "peft", "rapidfuzz", "scipy"}
        if name.split(".")[0] in heavy:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from rlhfctl.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def test_base_install(shared: Path, tmp_path: Path) -> None:
    """Nothing but the base requirements can be imported; data, tokenizers and the bridge report work."""
    question = {"role": "user", "content": "a"}
    data = rows(tmp_path / "d.jsonl", [question])
    sides = [str(shared / "tokenizers" / name) for name in ("qwen2", "llama-3-8b-instruct")]
    args = ["inspect-template", *sides, "--data", data, "--bridge", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY, *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["handled"] >= 4
