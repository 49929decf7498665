"""Small trainings in this process: what a fault does to them is compared with a run that nothing happened to."""

import importlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfctl.errors import Interrupted
from rlhfctl.recipe.load import load_recipe
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers.context import RunContext

SFT = """\
task: sft
name: faults
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {chains}/data/sft.jsonl, limit: 64}}], max_length: 64}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 6, batch_size: 8, tokens_per_microbatch: 1024, save_every: 2}}
"""
PPO = """\
task: ppo
name: faults
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
reward: {{sources: [{{kind: verifier, name: chain_answer}}]}}
rollout: {{n: 2, max_new_tokens: 6}}
algorithm: {{advantage: grpo, kl_coef: 0}}
data: {{train: [{{path: {chains}/data/prompts.jsonl, format: qa, limit: 64}}], max_length: 48}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 4, batch_size: 16, tokens_per_microbatch: 512}}
"""
RECIPES = {"sft": SFT, "ppo": PPO}

Train = Callable[..., RunDir]


@pytest.fixture
def train(chains: Path, tmp_path: Path) -> Train:
    """train(task, name, *overrides, resume=False, stop_after=None): the directory of a run; `said` collects its lines.

    stop_after: the step boundary at which the run is told to stop.
    """

    def run(
        task: str,
        name: str,
        *overrides: str,
        resume: bool = False,
        stop_after: int | None = None,
        said: list[str] | None = None,
    ) -> RunDir:
        recipe = tmp_path / f"{task}.yaml"
        recipe.write_text(RECIPES[task].format(chains=chains))
        directory = RunDir(tmp_path / name)
        directory.create()
        boundaries = iter([None] * (stop_after - 1) if stop_after else ())
        ctx = RunContext(
            load_recipe(str(recipe), overrides).recipe,
            directory,
            0,
            1,
            torch.device("cpu"),
            resume,
            1,
            lambda: next(boundaries, signal.SIGINT if stop_after else None),
            (said if said is not None else []).append,
        )
        trainer = importlib.import_module(f"rlhfctl.trainers.{task}")
        try:
            trainer.train(ctx)
        except Interrupted:
            assert stop_after is not None
        return directory

    return run
