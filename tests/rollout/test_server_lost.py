"""ppo when its rollout server dies: what is kept, what the sentence says, and that a resumed run is the same."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhfctl.errors import RunFailed
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import ppo
from rlhfctl.trainers.context import RunContext

RECIPE = """\
task: ppo
name: served
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {chains}/data/prompts.jsonl, format: qa}}], max_length: 48}}
reward: {{sources: [{{kind: python, path: {here}/reward.py}}]}}
rollout: {{engine: vllm_server, n: 2, max_new_tokens: 6, server: {{urls: [{url}]}}}}
algorithm: {{advantage: grpo, kl_coef: 0, importance_correction: tis}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 4, batch_size: 16, tokens_per_microbatch: 256, save_every: 3, log_every: 1}}
"""
REWARD = "def score(samples):\n    return [float(len(sample['response']) % 2) for sample in samples]\n"


@pytest.fixture
def server(chains, make_server):
    config = AutoConfig.from_pretrained(chains / "model")
    return make_server(AutoModelForCausalLM.from_config(config))


@pytest.fixture
def context(chains, server, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(chains=chains, here=tmp_path, url=server.url))

    def build(run, *overrides, resume=False):
        recipe = load_recipe(str(tmp_path / "recipe.yaml"), overrides).recipe
        directory = RunDir(tmp_path / run)
        directory.create()
        device = torch.device("cpu")
        return RunContext(recipe, directory, 0, 1, device, resume, 1, lambda: None, lambda line: None)

    return build


def records(ctx):
    rows = [json.loads(line) for line in ctx.run.metrics.read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(("seconds", "memory", "tokens_per"))}
        for row in rows
    ]


def test_a_rollout_without_a_server_keeps_the_step_before_it(context, server):
    whole = context("whole")
    ppo.train(whole)
    rows = records(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sync/canary"] < 1e-5 and row["sync/servers"] == 1 for row in rows)
    # The sampler's log-probabilities are what the server said, not the trainer's own.
    assert all(row["kl/rollout"] > 0.01 and 0 < row["importance/mean"] < 0.999 for row in rows)

    rollouts = []

    def dying(path, body, number):
        if path == "/inference/v1/generate" and "n" in body["sampling_params"]:
            rollouts.append(number)
            if len(rollouts) > 8 + 3:  # 8 prompts a step: the fourth answer of step 2 is cut off
                raise ConnectionError
        return {}

    server.fault = dying
    cut = context("cut")
    with pytest.raises(RunFailed, match=r"step 2: no rollout server is left .* kept, continue with --resume"):
        ppo.train(cut)
    assert records(cut) == rows[:1]
    assert cut.run.newest_checkpoint().name == "step_000001"
    server.fault = lambda path, body, number: {}
    ppo.train(context("cut", resume=True))
    assert records(cut) == rows
    final = "final/model.safetensors"
    assert (cut.run.path / final).read_bytes() == (whole.run.path / final).read_bytes()


def test_before_the_first_step_there_is_nothing_to_keep(context, server):
    def dying(path, body, number):
        if "n" in body.get("sampling_params", {}):
            raise ConnectionError
        return {}

    server.fault = dying
    ctx = context("early")
    with pytest.raises(RunFailed, match="step 1: no rollout server is left"):
        ppo.train(ctx)
    assert ctx.run.newest_checkpoint() is None
