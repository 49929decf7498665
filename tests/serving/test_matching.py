"""Labels for clients that send nothing but texts: rows found by their prompt, and never a near one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RULES = """
def score(samples):
    return [float(str(s["label"]) in s["response"]) + s["metadata"]["bonus"] for s in samples]
"""
QUESTIONS = (
    "What is 2 + 2?",
    "What is 2 + 3?",
    "Caf\u00e9 prices:\n  3 and 4?",
    "Is it not 5?",
    "Same?",
    "Same?",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("matching")
    (directory / "rules.py").write_text(RULES)
    rows = [
        {"question": q, "answer": str(n), "bonus": n * 10, "id": f"q{n}"} for n, q in enumerate(QUESTIONS)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module", params=["exact", "normalised", "fuzzy"])
def service(request: pytest.FixtureRequest, start: Callable[..., Any], home: Path) -> tuple[str, Any]:
    mode = request.param
    return mode, start(home / "rules.py", "--data", str(home / "rows.jsonl"), "--match", mode)


def test_the_row_gives_the_label_and_its_columns(service: tuple[str, Any]) -> None:
    served = service[1]
    prompts = [QUESTIONS[0], f"<s>{QUESTIONS[1]}", QUESTIONS[3]]
    queries = [f"{prompt} it is {n}</s>" for prompt, n in zip(prompts, (0, 7, 3), strict=True)]
    answer = served.post("/get_reward", json={"query": queries, "prompts": prompts})
    assert answer.json()["rewards"] == [1.0, 10.0, 31.0]
    assert served.metric('rlhfctl_matches_total{stage="drop_special_edges"}') == 3
    given = served.post(
        "/get_reward", json={"query": [queries[0]], "prompts": [prompts[0]], "labels": ["it"]}
    )
    assert given.json()["rewards"] == [1.0]
    empty = served.post(
        "/get_reward", json={"query": queries, "prompts": prompts, "labels": ["", "", None]}
    )  # OpenRLHF without a label_key
    assert empty.json()["rewards"] == [1.0, 10.0, 31.0]


@pytest.mark.parametrize(
    ("prompt", "modes"),
    [
        ("what is 2 + 2?", ("normalised", "fuzzy")),
        ("Cafe\u0301 prices: 3 and 4?", ("normalised", "fuzzy")),
        ("Caf\ufffd prices:\n  3 and 4?", ("fuzzy",)),
        ("What is 2 + 4?", ()),
        ("What is 2 - 2?", ()),
        ("Is it 5?", ()),
        ("Same?", ()),
    ],
)
def test_how_far_a_prompt_may_differ(service: tuple[str, Any], prompt: str, modes: tuple[str, ...]) -> None:
    mode, served = service
    answer = served.post("/get_reward", json={"query": [f"{prompt} x"], "prompts": [prompt]})
    assert answer.status_code == (200 if mode in modes else 422)
    if mode not in modes:
        assert answer.json()["error"]["fields"][0]["field"] == "prompts.0"


def test_without_prompts_no_row_can_be_found(service: tuple[str, Any]) -> None:
    answer = service[1].post("/get_reward", json={"query": ["x"]})
    assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "prompts")


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--match", "fuzzy"), 2, "--match fuzzy: give exact, normalised, fuzzy, and the rows with --data"),
        (("--data", "rows.jsonl", "--match", "near"), 2, "--match near"),
        (("--data", "absent.jsonl"), 5, "absent.jsonl"),
    ],
)
def test_what_is_refused(home: Path, options: tuple[str, ...], code: int, sentence: str) -> None:
    command = [sys.executable, "-m", "rlhfctl", "serve-rm", "rules.py", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=60)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert sentence in done.stderr
