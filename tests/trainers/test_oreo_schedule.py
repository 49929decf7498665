"""The policy's learning rate where the value model trains alone at first: its schedule is of its own steps."""

import json

import pytest
import torch

from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import oreo
from rlhfctl.trainers.context import RunContext


def test_the_schedule_of_the_policy_spans_the_steps_that_train_it(chains, tmp_path):
    """Two steps of five are the value model's; linear from 1e-3 over the other three: all, two thirds, one third."""
    rows = [
        {"prompt": "1+1?", "response": f"1+1={digit}\n#{digit}", "reward": float(digit == 2)}
        for digit in range(4)
    ]
    (tmp_path / "trajectories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "policy.path=null",
        f"policy.from_config={chains}/model",
        f"policy.tokenizer={chains}/model",
        f"data.train=[{{path: {tmp_path}/trajectories.jsonl, format: trajectory}}]",
        "data.eval=[]",
        "reward=null",
        "rollout=null",
        "algorithm.value_warmup_steps=2",
        "optim={lr: 1.0e-3, schedule: linear, warmup_ratio: 0}",
        "train={steps: 5, batch_size: 4, tokens_per_microbatch: 256, log_every: 1}",
    ]
    recipe = load_recipe("quickstart/oreo", overrides).recipe
    directory = RunDir(tmp_path / "run")
    directory.create()
    ctx = RunContext(recipe, directory, 0, 1, torch.device("cpu"), False, 1, lambda: None, lambda line: None)
    oreo.train(ctx)
    records = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    found = [record["lr"] for record in records]
    assert found == pytest.approx([0.0, 0.0, 1e-3, 2e-3 / 3, 1e-3 / 3])
