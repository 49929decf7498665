"""Every preflight check on real files: what passes is silent, what is wrong is one finding with its exit code."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfctl.preflight.finding import Finding
from rlhfctl.preflight.run import Report, run_preflight
from rlhfctl.recipe.tasks import TASKS

VERIFIER = {"kind": "verifier", "name": "chain_answer", "right": 1.0, "wrong": 0.1, "unparsable": 0.0}


def sft(chains: Path, **changes: Any) -> dict[str, Any]:
    model = str(chains / "model")
    return {
        "task": "sft",
        "name": "toy",
        "policy": {"from_config": model, "tokenizer": model},
        "data": {"train": [{"path": str(chains / "data/sft.jsonl")}], "max_length": 64},
        "train": {"steps": 4, "batch_size": 8},
        **changes,
    }


def ppo(chains: Path, **changes: Any) -> dict[str, Any]:
    return {
        **sft(chains),
        "task": "ppo",
        "data": {"train": [{"path": str(chains / "data/prompts.jsonl")}]},
        "reward": {"sources": [VERIFIER]},
        "rollout": {"max_new_tokens": 32},
        **changes,
    }


def preflight(recipe: dict[str, Any], run_dir: Path | None = None) -> Report:
    parsed = TASKS[recipe["task"]].model_validate(recipe)
    return run_preflight(SimpleNamespace(recipe=parsed), run_dir=run_dir)  # type: ignore[arg-type]


def problems(report: Report) -> dict[str, Finding]:
    return {f.id: f for f in report.findings if f.severity != "info" and not f.handled}


def one(report: Report, id: str, exit_code: int) -> Finding:
    """The only problem of the report."""
    assert list(problems(report)) == [id], report.rows()
    finding = problems(report)[id]
    assert report.exit_code == finding.exit_code == exit_code
    assert "\n" not in finding.title + finding.fix
    return finding


def python_reward(tmp_path: Path, body: str, timeout: float = 20.0) -> dict[str, Any]:
    path = tmp_path / "rewards.py"
    path.write_text(f"import math, time\n\ndef score(samples):\n    {body}\n")
    return {"sources": [{"kind": "python", "path": str(path), "timeout": timeout}]}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


# What is right passes


@pytest.mark.parametrize("make", [sft, ppo])
def test_the_quickstart_recipes_pass(make: Any, chains: Path, tmp_path: Path) -> None:
    report = preflight(make(chains), tmp_path / "run")
    assert problems(report) == {}
    assert (report.exit_code, report.status) == (0, "ok")
    facts = {finding.id: finding.evidence for finding in report.findings}
    assert facts["D004"]["rows"] == 400
    assert facts["X009"]["parameters"] == pytest.approx(163_000, rel=0.01)
    assert not (tmp_path / "run").exists()


def test_nothing_heavy_is_imported(chains: Path) -> None:
    code = (
        "import json, sys; from types import SimpleNamespace; from rlhfctl.recipe.tasks import PpoRecipe;"
        "from rlhfctl.preflight.run import run_preflight;"
        "r = run_preflight(SimpleNamespace(recipe=PpoRecipe.model_validate(json.loads(sys.argv[1]))));"
        "print(r.exit_code, [m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps(ppo(chains))], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "0 []"


# Models


def test_an_absent_policy_is_one_finding(chains: Path) -> None:
    recipe = ppo(chains, policy={"path": "no/such/model/here"})
    report = preflight(recipe)
    finding = one(report, "W001", 5)
    assert "does not exist" in finding.title
    assert {f.title for f in report.findings if f.id == "C001"}, "what could not be checked is said"


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_hub_id_that_this_machine_cannot_get(offline: str, chains: Path, tmp_path: Path) -> None:
    """Offline by request, and by a hub that nobody answers for."""
    out = dry_run_with_hub_policy("nobody/nothing", chains, tmp_path, offline)
    assert [finding["id"] for finding in out["findings"] if finding["severity"] == "error"] == ["W002"]
    assert out["exit_code"] == 4


@pytest.mark.parametrize(("offline", "id", "exit_code"), [("1", "W002", 4), ("0", "W003", 0)])
def test_a_hub_id_whose_small_files_are_cached(
    offline: str, id: str, exit_code: int, chains: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(chains / "model", snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    out = dry_run_with_hub_policy("some/model", chains, tmp_path, offline)
    found = {finding["id"]: finding for finding in out["findings"]}
    assert id in found
    assert out["exit_code"] == exit_code, out["findings"]
    assert "D004" in found, "the rest is checked with the cached tokenizer"
    assert "X009" in found


def dry_run_with_hub_policy(name: str, chains: Path, cache: Path, offline: str) -> dict[str, Any]:
    """The hub client reads its settings at import: a process of its own, with a hub that refuses connections."""
    env = {"HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    recipe = sft(chains, policy={"path": name})
    (cache / "recipe.json").write_text(json.dumps(recipe))
    out = subprocess.run(
        [sys.executable, "-m", "rlhfctl", "sft", str(cache / "recipe.json"), "--dry-run", "--json"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = json.loads(out.stdout)
    return result


def test_a_damaged_checkpoint(shared: Path, tmp_path: Path, chains: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shared / "models" / "stories260k", model, copy_function=shutil.copy)
    weights = model / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-100])
    recipe = sft(chains, policy={"path": str(model)})
    recipe["data"]["max_length"] = 512
    damaged = problems(preflight(recipe))["W006"]  # its tokenizer has warnings of its own
    assert "is cut" in damaged.detail
    weights.unlink()
    assert problems(preflight(recipe))["W005"].exit_code == damaged.exit_code == 5


def test_tokenizer_larger_than_the_embedding(chains: Path, shared: Path) -> None:
    recipe = sft(chains)
    recipe["policy"]["tokenizer"] = str(shared / "models" / "stories260k")
    recipe["policy"]["chat_template"] = str(chains / "t.jinja")
    (chains / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    finding = problems(preflight(recipe))["S003"]
    assert finding.evidence == {"tokens": 512, "rows": 19}
    assert finding.exit_code == 5


def head_model(directory: Path, chains: Path, name: str, shape: list[int], raw: bytes) -> str:
    shutil.copytree(chains / "model", directory)
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, len(raw)]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw)
    return str(directory)


@pytest.mark.parametrize(
    ("name", "shape", "values", "id"),
    [
        ("score.weight", [1, 64], [0.5] * 64, None),
        ("v_head.weight", [1, 64], [0.5] * 64, None),
        ("lm_head.weight", [1, 64], [0.5] * 64, "W007"),
        ("score.weight", [2, 64], [0.5] * 128, "W008"),
        ("score.weight", [1, 32], [0.5] * 32, "W008"),
        ("score.weight", [1, 64], [0.0] * 64, "W009"),
        ("score.weight", [1, 64], [0.5] * 63 + [float("nan")], "W009"),
    ],
)
def test_the_reward_head(
    name: str, shape: list[int], values: list[float], id: str | None, chains: Path, tmp_path: Path
) -> None:
    path = head_model(tmp_path / "rm", chains, name, shape, struct.pack(f"<{len(values)}f", *values))
    recipe = ppo(chains, reward={"sources": [{"kind": "model", "path": path}]})
    found = [finding for finding in problems(preflight(recipe)) if finding.startswith("W")]
    assert found == ([id] if id else [])


def test_a_head_in_a_file_that_nobody_reads(chains: Path, tmp_path: Path) -> None:
    """A shard that an earlier save left: the model is read from model.safetensors alone."""
    left, raw = tmp_path / "left", struct.pack("<64f", *[0.5] * 64)
    head_model(left, chains, "score.weight", [1, 64], raw)
    path = head_model(tmp_path / "rm", chains, "lm_head.weight", [1, 64], raw)
    shutil.copy(left / "model.safetensors", tmp_path / "rm/model-00001-of-00001.safetensors")
    recipe = ppo(chains, reward={"sources": [{"kind": "model", "path": path}]})
    assert "W007" in problems(preflight(recipe))
    shutil.copy(left / "model.safetensors", tmp_path / "rm/value_head.safetensors")
    assert "W007" not in problems(preflight(recipe))


def test_options_that_name_what_is_not_there(chains: Path, shared: Path, tmp_path: Path) -> None:
    one(preflight(ppo(chains, value_model={"init": "reward_model"})), "W010", 2)
    policy = {"path": str(shared / "models/stories260k"), "lora": {"target_modules": ["q_proj", "qkv"]}}
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    finding = problems(preflight(ppo(chains, policy={**policy, "chat_template": str(template)})))["W011"]
    assert "qkv not in" in finding.title
    assert "q_proj" not in finding.title


# The template


def test_a_policy_without_a_template(chains: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chains / "model", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    report = preflight(sft(chains, policy={"from_config": str(model), "tokenizer": str(model)}))
    assert report.exit_code == 3
    assert len([f for f in report.findings if f.severity == "error"]) == 1
    assert any(f.id == "C001" and f.title.startswith("rows") for f in report.findings)


# Data


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such data file"),
        ([], "is empty"),
        (["{not json\n"], "row 1: not JSON"),
        ([{"prompt": "1+1?", "response": ""}], "row 1: response is empty"),
        ([{"colour": "red"}], "colour"),
    ],
)
def test_data_that_cannot_be_used(
    content: list[Any] | None, sentence: str, chains: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        write_jsonl(path, content)
    report = preflight(sft(chains, data={"train": [{"path": str(path)}]}))
    finding = one(report, "D001", 5)
    assert sentence in finding.detail
    assert str(path) in finding.detail


def test_every_finding_of_both_splits_in_one_report(chains: Path, tmp_path: Path) -> None:
    data = {"train": [{"path": str(tmp_path / "a.jsonl")}], "eval": [{"path": str(tmp_path / "b.jsonl")}]}
    report = preflight(sft(chains, data=data))
    assert sum(finding.id == "D001" for finding in report.findings) == 2


def test_rows_left_out_are_counted(chains: Path, tmp_path: Path) -> None:
    row = {"prompt": "1+1+1+1+1?", "response": "#5"}
    rows = [{"id": "a", **row}, {"id": "a", **row}, {**row, "prompt": "1+" * 40 + "1?"}, "nonsense\n"]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = problems(
        preflight(sft(chains, data={"train": [{"path": path}], "max_length": 64, "max_bad_rows": 1}))
    )
    assert set(found) == {"D002", "D003"}
    assert found["D002"].evidence["rows"] == [4]
    report = preflight(sft(chains, data={"train": [{"path": path}], "max_length": 64, "max_bad_rows": 1}))
    left_out = next(finding for finding in report.findings if finding.id == "D006")
    assert left_out.evidence["dropped"] == {"too long": 1}
    nothing = preflight(sft(chains, data={"train": [{"path": path}], "max_length": 5, "max_bad_rows": 1}))
    assert problems(nothing)["D005"].exit_code == 5
    assert "raise data.max_length" in problems(nothing)["D005"].fix


# Lengths and batches


def test_a_context_shorter_than_the_prompt(chains: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "1+" * 40 + "1?", "answer": "1"}] * 2)
    recipe = ppo(chains, data={"train": [{"path": path}]}, rollout={"max_new_tokens": 32})
    finding = problems(preflight(recipe))["S004"]
    assert finding.evidence["context"] == 64
    assert finding.evidence["longest"] == 82
    assert "use a model with a longer context" in finding.fix
    recipe = ppo(chains, rollout={"max_new_tokens": 60})
    assert "lower rollout.max_new_tokens" in one(preflight(recipe), "S004", 5).fix


def test_a_row_longer_than_the_context(chains: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1+" * 40 + "1?", "response": "#1"}, {"prompt": "1+1+1+1+1?", "response": "#5"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = sft(chains, data={"train": [{"path": path}], "max_length": 1024})
    assert one(preflight(recipe), "S004", 5).fix == "set data.max_length to at most 64"
    recipe = sft(chains)
    recipe["data"]["max_length"] = 1024
    assert list(problems(preflight(recipe))) == ["S005"]


def test_a_row_that_longrope_turns_by_other_factors(chains: Path, tmp_path: Path) -> None:
    """All rows of its pack would be: here from 32 tokens on, in a context of 64."""
    model = Path(shutil.copytree(chains / "model", tmp_path / "model"))
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    rope = {"type": "longrope", **factors}
    config = json.loads((model / "config.json").read_text())
    config |= {"rope_scaling": rope, "original_max_position_embeddings": 32}
    (model / "config.json").write_text(json.dumps(config))
    policy = {"from_config": str(model), "tokenizer": str(model)}
    rows = [{"prompt": "1+" * 16 + "1?", "response": "#1"}, {"prompt": "1+1?", "response": "#2"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = sft(chains, policy=policy, data={"train": [{"path": path}], "max_length": 64})
    finding = one(preflight(recipe), "S004", 5)
    assert "1 of 2 rows do not fit the 32 tokens that the model's longrope reads" in finding.title
    assert finding.fix == "set data.max_length to at most 32"
    path = write_jsonl(tmp_path / "rows.jsonl", rows[1:])
    recipe = sft(chains, policy=policy, data={"train": [{"path": path}], "max_length": 64})
    assert list(problems(preflight(recipe))) == ["S005"]


def test_a_batch_that_ranks_cannot_share(chains: Path) -> None:
    launch = {"launcher": "torchrun", "nproc_per_node": 3}
    found = problems(preflight(sft(chains, launch=launch)))
    assert (found["S002"].severity, found["S002"].exit_code) == ("error", 5)
    assert preflight(sft(chains, launch=launch, template={"allow": ["S002"]})).exit_code == 0
    launch["nproc_per_node"] = 9
    found = problems(preflight(sft(chains, launch=launch)))
    assert found["S001"].exit_code == 5
    assert "9 ranks" in found["S001"].title


# Rewards


@pytest.mark.parametrize(
    ("body", "id", "sentence"),
    [
        ("return [float(len(s['response'])) for s in samples]", "R004", ""),
        ("return [float(s['response'].endswith('#' + s['label'])) for s in samples]", None, ""),
        ("raise KeyError('gold')", "R002", "gold"),
        ("return [math.nan for s in samples]", "R002", "nan"),
        ("return [0.5]", "R002", ""),
        ("return [1.0 for s in samples]", "R003", "constant"),
        ("time.sleep(60)", "R002", "2"),
    ],
)
def test_python_rewards(body: str, id: str | None, sentence: str, chains: Path, tmp_path: Path) -> None:
    recipe = ppo(chains, reward=python_reward(tmp_path, body, timeout=2.0))
    found = problems(preflight(recipe))
    if id is None:
        assert found == {}
    elif id == "R004":  # a reward for length tells right from wrong at random: some rows, not all
        assert set(found) <= {"R004"}
    else:
        assert sentence in one(preflight(recipe), id, 5).detail.lower()


def test_a_reward_on_rows_without_any_answer(chains: Path, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": f"{n}+1?"}]} for n in range(9)]
    )
    data = {"train": [{"path": path, "format": "messages"}]}
    good = python_reward(tmp_path, "return [float(len(s['response'])) for s in samples]")
    assert problems(preflight(ppo(chains, data=data, reward=good))) == {}
    constant = python_reward(tmp_path, "return [0.0] * len(samples)")
    report = preflight(ppo(chains, data=data, reward=constant))
    one(report, "R003", 5)
    allowed = preflight(ppo(chains, data=data, reward=constant, template={"allow": ["R003"]}))
    assert allowed.exit_code == 0
    assert allowed.as_dict()["summary"]["handled"] == 1
    finding = one(preflight(ppo(chains, data=data)), "R005", 5)
    assert "9 of 9 rows have no label" in finding.title


def test_a_reward_that_likes_the_wrong_answer(chains: Path, tmp_path: Path) -> None:
    body = "return [-float(s['response'].endswith(s['label'])) for s in samples]"
    finding = one(preflight(ppo(chains, reward=python_reward(tmp_path, body))), "R004", 5)
    assert "8 of 8" in finding.title


@pytest.mark.parametrize(("body", "id"), [("return [0.0] * len(samples)", "R003"), (None, "R004")])
def test_a_poor_source_beside_a_good_one_is_a_warning(
    body: str | None, id: str, chains: Path, tmp_path: Path
) -> None:
    poor = python_reward(
        tmp_path, body or "return [-float(s['response'].endswith(s['label'])) for s in samples]"
    )
    verifier = {"kind": "verifier", "name": "chain_answer"}
    both = {"sources": [*poor["sources"], verifier]}
    found = problems(preflight(ppo(chains, reward=both)))
    assert found[id].severity == "warning"


def test_a_source_of_weight_0_is_measured_and_judges_nothing(chains: Path, tmp_path: Path) -> None:
    """It may be constant, and it does not excuse another that is."""
    constant = python_reward(tmp_path, "return [0.0] * len(samples)")["sources"][0]
    verifier = {"kind": "verifier", "name": "chain_answer"}
    measured = {"sources": [{**constant, "weight": 0.0}, verifier]}
    assert problems(preflight(ppo(chains, reward=measured))) == {}
    paid = {"sources": [constant, {**verifier, "weight": 0.0}]}
    assert one(preflight(ppo(chains, reward=paid)), "R003", 5).severity == "error"


def test_a_missing_reward_file(chains: Path, tmp_path: Path) -> None:
    reward = {"sources": [{"kind": "python", "path": str(tmp_path / "absent.py")}]}
    assert "does not exist" in one(preflight(ppo(chains, reward=reward)), "R001", 5).detail


# The machine


def test_a_model_too_large_for_memory_and_disk(chains: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(chains / "model", model)
    config = json.loads((model / "config.json").read_text())
    config.update(hidden_size=65536, intermediate_size=262144, num_hidden_layers=200)
    (model / "config.json").write_text(json.dumps(config))
    report = preflight(
        sft(chains, policy={"from_config": str(model), "tokenizer": str(model)}), tmp_path / "a/b"
    )
    assert report.exit_code == 4
    found = problems(report)
    assert {"X007", "X008"} <= set(found)
    assert str(tmp_path) in found["X008"].title


def test_what_zero_divides_is_not_asked_of_one_rank(chains: Path) -> None:
    """P of 0.16 M in float32: 4 P of weights, 4 P of gradients, 8 P of moments, divided over 4 ranks."""
    least = {}
    for stage in range(4):
        keys = {"launch": {"nproc_per_node": 4}, "deepspeed": {"zero_stage": stage}}
        evidence = next(f.evidence for f in preflight(sft(chains, **keys)).findings if f.id == "X009")
        least[stage] = evidence["memory"] / evidence["parameters"]
    assert [round(least[stage], 2) for stage in range(4)] == [16, 8 + 2, 4 + 1 + 2, 1 + 1 + 2]


def test_a_missing_package_names_the_extra(chains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    finding = one(preflight(sft(chains)), "X001", 4)
    assert finding.evidence["missing"] == ["torch"]
    assert "pip install 'rlhfctl[train]'" in finding.fix


def test_an_endpoint_in_use(chains: Path) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        endpoint = f"127.0.0.1:{holder.getsockname()[1]}"
        launch = {"nnodes": 2, "rdzv_endpoint": endpoint, "nproc_per_node": 1}
        one(preflight(sft(chains, launch=launch)), "X006", 4)
    launch["rdzv_endpoint"] = "no-such-host.invalid:1"
    one(preflight(sft(chains, launch=launch)), "X006", 4)
