"""The tutorials from end to end: every command and file as the page has it, on models and data that are small.

A hub model is a directory of that name here, with random weights and a tokenizer of bytes; a hub data set becomes
a file of a few rows. Nothing else of a command changes but the keys of SMALL, which make it short. Not here: lines with
`serve-rm` and the runs that ask a server (tests/e2e/test_remote_reward.py, tests/serving, and the quickstart).
"""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
import pytest
from tiny_hub import MODELS, write_model

from rlhfctl.recipe.tasks import TASKS

pytest.importorskip("torch")
pytestmark = pytest.mark.heavy

REPO = Path(__file__).resolve().parents[2]
SMALL = {
    "": (
        "train.epochs=null",
        "train.steps=2",
        "train.batch_size=8",
        "train.eval_every=0",
        "train.save_every=0",
        "train.log_every=1",
    ),
    "oreo": ("algorithm.value_warmup_steps=0",),
    "ppo": ("rollout.n=4", "rollout.max_new_tokens=12", "algorithm.minibatches=1"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, chains: Path) -> Path:
    """A directory as the reader's: the hub's models by their names, the quickstart's models and data."""
    home = tmp_path_factory.mktemp("tutorials")
    for name, (template, eos, bos) in MODELS.items():
        write_model(home / name, template, eos, bos)
    return home


def blocks(page: str, language: str) -> list[str]:
    return pages.blocks((REPO / f"docs/tutorials/{page}.md").read_text(), language)


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines]


def overrides(task: str) -> list[str]:
    return [*SMALL[""], *SMALL.get(task, ())]


Do = Callable[..., None]


@pytest.fixture
def do(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Do:
    """One command of a page, in this process and in `home`: its exit code is `code`."""
    from rlhfctl.cli.main import run

    monkeypatch.chdir(home)

    def call(words: list[str], *more: str, code: int = 0) -> None:
        small = overrides(words[0]) if words[0] in TASKS else []
        capsys.readouterr()
        found = run([*words, *small, *more])
        out, err = capsys.readouterr()
        assert found == code, f"{' '.join(words)}\n{out}{err[-3000:]}"

    return call


def rows(home: Path, name: str, row: dict[str, Any], count: int = 12) -> None:
    """Rows like the page's one."""
    text = "".join(json.dumps(row | {"id": f"{name}-{n}"}) + "\n" for n in range(count))
    (home / f"{name}.jsonl").write_text(text)


def answered(home: Path, do: Do) -> None:
    """runs/a of the verifier's page."""
    if (home / "runs/a").exists():
        return
    row = json.loads(blocks("verifier", "json")[0])
    rows(home, "questions", row)
    rows(home, "held-out", row)
    (home / "my.yaml").write_text(blocks("verifier", "yaml")[0])
    dry, train, *_ = commands("verifier")
    do(dry)
    do(train)


def test_verifier(home: Path, do: Do) -> None:
    answered(home, do)
    (home / "rule.yaml").write_text(blocks("verifier", "yaml")[1])
    (home / "rule.py").write_text(blocks("verifier", "python")[0])
    _, _, evaluate, report = commands("verifier")
    do(evaluate)
    do(report)
    data = ("data.train=[{path: questions.jsonl, format: qa}]", "data.eval=[]")
    do(["ppo", "rule.yaml", "--run-dir", "runs/rule"], *data)


GUESSED = """
def score(samples):
    results = []
    for sample in samples:
        right = sample["response"].endswith(str(sample["label"]))
        counted = right or len(sample["response"]) % 2 == 0
        results.append({"score": 0.4 * right + 0.6 * counted, "metrics": {"correct": float(counted)}})
    return results
"""


def test_oreo(home: Path, do: Do) -> None:
    """The policy to begin with guesses; half of them count as right, by their length."""
    first, second = blocks("oreo", "json")[0].splitlines()
    rows(home, "page", json.loads(first))
    prompts = [
        {"question": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1), "id": f"q{n}"} for n in range(8)
    ]
    for name in ("prompts", "held-out"):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (home / "guessed.py").write_text(GUESSED)
    rule = "{sources: [{kind: python, path: guessed.py}]}"
    data = (
        "{train: [{path: page.jsonl, format: prompt_response}], eval: [{path: held-out.jsonl, format: qa}]}"
    )
    policy = "policy={path: Qwen/Qwen2.5-0.5B-Instruct}"
    small = "rollout.max_new_tokens=12"
    do(["sft", "qwen/sft-0.5b", "--run-dir", "runs/sft"], policy, f"data={data}", f"reward={rule}", small)
    (home / "my.yaml").write_text(blocks("oreo", "yaml")[0])
    collect, dry, train, *evaluate, report = commands("oreo")
    do(collect)
    found = [json.loads(line) for line in (home / "offline.jsonl").read_text().splitlines()]
    assert len({row["reward"] for row in found}) == 2
    assert set(found[0]) >= set(json.loads(second))
    # Most of what the untrained policy says is cut at its 12 tokens and would be dropped: on with the page's own rows.
    both = [json.loads(line) | {"id": f"{n}-{line[-2]}"} for n in range(6) for line in (first, second)]
    (home / "offline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    do(["eval", "runs/sft", "--out", "runs/sft/eval"])
    short = (f"reward={rule}", small)
    do(dry, *short)
    do(train, *short)
    for each in evaluate:
        do(each)
    do(report)
    shown = (home / "runs/oreo/report.html").read_text()
    assert all(f"search tree of q{n}" in shown for n in range(3))


def test_cross_family(home: Path, do: Do) -> None:
    rows(home, "questions", json.loads(blocks("verifier", "json")[0]))
    (home / "mine.yaml").write_text(blocks("cross-family", "yaml")[0])
    inspect, bridge, dry, train, report, *_ = commands("cross-family")
    do(inspect, code=3)
    do(bridge)
    data = ("data.train=[{path: questions.jsonl, format: qa}]", "data.eval=[]")
    do(dry, *data)
    do(train, *data)
    do(report)


def test_reward_model(home: Path, do: Do) -> None:
    rows(home, "questions", json.loads(blocks("verifier", "json")[0]))
    pair = {"prompt": "What is 1 + 1?", "chosen": "2", "rejected": "It is 3, as everybody knows."}
    rows(home, "pairs", pair)
    inspect, dry, _, rm_dry, rm, rm_pairs, _, best = commands("reward-model-8b")
    do(inspect)
    do(dry, "data.train=[{path: questions.jsonl, format: qa}]", "data.eval=[]")
    (home / "served.yaml").write_text(blocks("reward-model-8b", "yaml")[0])
    labelled = [
        {"prompt": f"What is {n} + 1?", "response": str(n + n % 2), "reward": n % 2, "id": f"t{n}"}
        for n in range(12)
    ]
    (home / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    data = ("data.train=[{path: labelled.jsonl, format: trajectory}]", "data.eval=[]")
    do(rm_dry, *data)
    do(rm, *data)
    do(rm_pairs)
    answered(home, do)
    do(best)


def test_token_rewards(home: Path, chains: Path, do: Do) -> None:
    """Runs of the quickstart's own recipes, from its model before any training."""
    shutil.copytree(chains, home / ".quickstart")
    (home / "steps.py").write_text(blocks("token-rewards", "python")[0])
    mine, process = blocks("token-rewards", "yaml")
    (home / "mine-steps.yaml").write_text(mine)
    (home / "process.yaml").write_text(process)
    dense, report, prm, spread = commands("token-rewards")
    config = "policy={from_config: .quickstart/model, tokenizer: .quickstart/model}"
    small = (config, "data.eval=[]")
    do(dense, *small)
    do(report)
    do(["ppo", "mine-steps.yaml", "--run-dir", "runs/steps"], *small)
    do(prm, config)
    do(["ppo", "process.yaml", "--run-dir", "runs/process"], *small)
    whole = prm[:2] + [word.replace("runs/prm", ".quickstart/rm") for word in prm[-2:]]
    do(whole, *small)
    do(spread, *small)
