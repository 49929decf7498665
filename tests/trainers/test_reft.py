"""Two phases of one run: what each is, and that a stop in either changes nothing."""

import json
from pathlib import Path

import pytest
import torch

from rlhfctl.errors import Interrupted, UsageError
from rlhfctl.quickstart.chains import main as make_quickstart
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import reft
from rlhfctl.trainers.context import RunContext

SHORT = [
    "warmup.steps=4",
    "warmup.batch_size=8",
    "train.batch_size=8",
    "train.save_every=2",
    "rollout.max_new_tokens=8",
]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("reft")
    make_quickstart([str(root)])

    return [
        f"policy.from_config={root}/model",
        f"policy.tokenizer={root}/model",
        f"data.train.0.path={root}/data/sft.jsonl",
        "data.train.0.limit=64",
        f"data.eval.0.path={root}/data/eval.jsonl",
        "train.eval_samples=4",
        "train.steps=4",
        *SHORT,
    ]


def run(path: Path, overrides: list[str], resume: bool, stop_at: int | None = None) -> RunDir:
    directory = RunDir(path)
    directory.create()

    def stop() -> int | None:
        rows = directory.metrics.read_text().splitlines() if directory.metrics.exists() else []
        return 2 if stop_at is not None and json.loads(rows[-1])["step"] >= stop_at else None

    recipe = load_recipe("quickstart/reft", [*overrides, "train.log_every=1"]).recipe
    ctx = RunContext(recipe, directory, 0, 1, torch.device("cpu"), resume, 1, stop, lambda line: None)
    reft.train(ctx)
    return directory


def told(directory: RunDir) -> list[dict[str, float]]:
    clock = ("seconds", "memory", "tokens_per_second")
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


def test_stopped_in_either_phase_it_ends_the_same(quickstart: list[str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", quickstart, resume=False)
    rows = told(whole)
    assert [(row["step"], row["phase"]) for row in rows] == [(s, 1 if s <= 4 else 2) for s in range(9)]
    assert all(("loss/sft" in row) == (0 < row["step"] <= 4) for row in rows)
    parted = tmp_path / "parted"
    for resume, stop_at in ((False, 1), (True, 3), (True, 5), (True, 7)):
        with pytest.raises(Interrupted):
            run(parted, quickstart, resume, stop_at)
    again = run(parted, quickstart, resume=True)
    assert told(again) == rows
    for name in ("warmup", "final"):
        weights = [(directory.path / name / "model.safetensors").read_bytes() for directory in (whole, again)]
        assert weights[0] == weights[1]

    # The second phase is measured against the end of the first: no drift at its first step.
    assert abs(rows[5]["kl/reference"]) < 1e-6


def test_the_value_model_warms_up_in_the_first_steps_of_its_own_phase(
    quickstart: list[str], tmp_path: Path
) -> None:
    """Steps 5 and 6 of the run: the policy stands still, and the KL coefficient waits for it."""
    options = ["algorithm.value_warmup_steps=2", "algorithm.kl_coef=0.05", "algorithm.kl_target=0.1"]
    rows = told(run(tmp_path / "warm", [*quickstart, *options], resume=False))[5:]
    assert [(row["step"], row["value/warmup"]) for row in rows] == [(5, 1), (6, 1), (7, 0), (8, 0)]
    assert [row["kl/policy"] < 1e-12 for row in rows] == [True, True, False, False]
    coefs = [row["kl/coef"] for row in rows]
    assert coefs[:3] == [0.05] * 3
    assert coefs[3] != 0.05


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["warmup=null"], "random weights are not warmed up"),
        (["reference=x"], "reference is the end of the warm-up"),
        (["warmup.epochs=2"], "give either warmup.steps or warmup.epochs"),
        (["warmup.lr=0"], "warmup.lr must be"),
    ],
)
def test_recipes_that_do_not_fit(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_recipe("quickstart/reft", overrides)
