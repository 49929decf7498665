"""A ppo run of the tiny model in this process: random weights, and a reward that has both values."""

import json
import signal

import pytest
import torch

from rlhfctl.errors import Interrupted
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import ppo
from rlhfctl.trainers.context import RunContext

RECIPE = """\
task: ppo
name: tiny
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {chains}/data/prompts.jsonl, format: qa}}], max_length: 64}}
reward: {{sources: [{{kind: python, path: {here}/reward.py}}]}}
rollout: {{n: 2, max_new_tokens: 6}}
algorithm: {{advantage: grpo, kl_coef: 0}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 4, batch_size: 16, tokens_per_microbatch: 256}}
"""

# Zero for about half of the samples: of pairs, half have no signal.
REWARD = """\
def score(samples):
    return [float(len(sample["response"]) % 2) for sample in samples]
"""


@pytest.fixture
def context(chains, tmp_path):
    """context(run, *overrides, resume=False): what a trainer is handed for a run in tmp_path / run."""
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(chains=chains, here=tmp_path))

    def build(run, *overrides, resume=False):
        recipe = load_recipe(str(tmp_path / "recipe.yaml"), overrides).recipe
        directory = RunDir(tmp_path / run)
        directory.create()
        said = []
        device = torch.device("cpu")
        return RunContext(recipe, directory, 0, 1, device, resume, 1, lambda: None, said.append)

    return build


@pytest.fixture
def train(context):
    """train(run, *overrides, resume=False, stop_after=None): its records without times, and its directory.

    stop_after: the step boundary at which the run is told to stop.
    """

    def run(name, *overrides, resume=False, stop_after=None):
        ctx = context(name, *overrides, resume=resume)
        if stop_after is None:
            ppo.train(ctx)
        else:
            asked = iter([None] * (stop_after - 1))
            ctx.stop_signal = lambda: next(asked, signal.SIGINT)
            with pytest.raises(Interrupted):
                ppo.train(ctx)
        records = [json.loads(line) for line in ctx.run.metrics.read_text().splitlines()]
        volatile = ("seconds/", "memory/", "tokens_per_second")
        kept = [{k: v for k, v in record.items() if not k.startswith(volatile)} for record in records]
        return kept, ctx.run

    return run
