"""Work counted, not timed: tokens forward, positions of the head, generated tokens and optimizer steps of each recipe.

A change that pads, computes logits where nothing is trained, runs a second forward for what is known or prefills a
prompt twice moves one of these numbers. They are exact: what is counted is the shape of every call.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaModel

from rlhfctl.models.linear import onednn_is_faster
from rlhfctl.recipe.load import load_recipe
from rlhfctl.rollout.decode import StaticDecoder
from rlhfctl.run_dir import RunDir
from rlhfctl.trainers import oreo, ppo, reward_model, sft
from rlhfctl.trainers.context import RunContext
from rlhfctl.trainers.optimizer import Optimizer

VOCABULARY, HIDDEN = 19, 64
TRAIN = {"sft": sft.train, "rm": reward_model.train, "ppo": ppo.train, "oreo": oreo.train}
RECIPE = """
task: {task}
name: counted
policy: {{from_config: {chains}/model, tokenizer: {chains}/model}}
data: {{train: [{{path: {data}, format: {format}}}], max_length: 64}}
optim: {{lr: 1.0e-3, schedule: constant, warmup_ratio: 0}}
train: {{steps: 2, batch_size: 8, tokens_per_microbatch: 4096, log_every: 1}}
{rest}
"""
GROUPS = """
reward: {sources: [{kind: verifier, name: chain_answer, right: 1.0, wrong: 0.1, unparsable: 0.0}]}
rollout: {n: 4, max_new_tokens: 6}
"""


class Heads(TorchDispatchMode):
    """Rows of every product with the output embedding that gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and (args[0].shape[1], out.shape[1]) == (HIDDEN, VOCABULARY):
            self.rows += out.shape[0]
        elif func is torch.ops.aten.linear.default and args[1].shape == (VOCABULARY, HIDDEN):
            self.rows += out.numel() // VOCABULARY  # in inference mode a linear layer is not taken apart
        return out


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """forward: tokens that passed a trunk, split by whether a gradient was recorded; head; optimizer steps."""
    counts = {"with_gradient": 0, "without_gradient": 0, "head": 0, "optimizer_steps": 0}

    forward, decode, step = LlamaModel.forward, StaticDecoder.step, Optimizer.step

    def forward_counted(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        kind = "with_gradient" if torch.is_grad_enabled() else "without_gradient"
        counts[kind] += kwargs["input_ids"].numel()
        return forward(self, *args, **kwargs)

    def decode_counted(self: StaticDecoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        counts["without_gradient"] += ids.numel()
        return decode(self, ids, positions)

    def step_counted(self: Optimizer, scale: float) -> None:
        counts["optimizer_steps"] += 1
        step(self, scale)

    with monkeypatch.context() as patch, Heads() as heads:
        patch.setattr(LlamaModel, "forward", forward_counted)
        patch.setattr(StaticDecoder, "step", decode_counted)
        patch.setattr(Optimizer, "step", step_counted)
        yield counts
    counts["head"] = heads.rows


@pytest.fixture
def work(chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """work(task, data, format, rest of the recipe): the counts of two steps, their records, and the rows."""
    monkeypatch.setenv(
        "RLHFCTL_MATMUL", "torch"
    )  # one library on every processor: packs are not filled up for it
    onednn_is_faster.cache_clear()

    def run(
        task: str, data: Path, form: str, rest: str = ""
    ) -> tuple[dict[str, int], list[dict[str, float]]]:
        (tmp_path / "r.yaml").write_text(
            RECIPE.format(task=task, chains=chains, data=data, format=form, rest=rest)
        )
        recipe = load_recipe(str(tmp_path / "r.yaml")).recipe
        directory = RunDir(tmp_path / "run")
        directory.create()
        cpu = torch.device("cpu")
        with counted(monkeypatch) as counts:
            TRAIN[task](RunContext(recipe, directory, 0, 1, cpu, False, 1, lambda: None, lambda line: None))
        return counts, [json.loads(line) for line in directory.metrics.read_text().splitlines()]

    yield run
    onednn_is_faster.cache_clear()


def test_sft_runs_each_token_once_and_the_head_on_trained_ones(work: Any, chains: Path) -> None:
    counts, records = work("sft", chains / "data/sft.jsonl", "prompt_response")
    trained = sum(int(record["tokens_trained"]) for record in records)
    tokens = int(records[-1]["tokens"])
    assert (tokens, trained) == (592, 432)
    assert counts == {"with_gradient": tokens, "without_gradient": 0, "head": trained, "optimizer_steps": 2}


def test_rm_runs_chosen_and_rejected_once_and_what_they_share_together(work: Any, chains: Path) -> None:
    counts, records = work("rm", chains / "data/pairs.jsonl", "preference")
    assert int(records[-1]["tokens"]) == 1184
    # 362 tokens are the beginnings that both sides of a pair have in common.
    assert counts == {"with_gradient": 822, "without_gradient": 0, "head": 0, "optimizer_steps": 2}


def test_oreo_runs_the_reference_once_a_row(work: Any, chains: Path, tmp_path: Path) -> None:
    """Over two epochs of the same rows: policy and value model twice, the reference once."""
    lines = (chains / "data/sft.jsonl").read_text().splitlines()[:8]
    rows = [json.loads(line) | {"reward": float(number % 2)} for number, line in enumerate(lines)]
    data = tmp_path / "trajectories.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts, records = work("oreo", data, "trajectory")
    tokens = int(records[-1]["tokens"]) // 2
    actions = tokens - 8 * 10
    assert (tokens, actions) == (296, 216)
    assert counts["with_gradient"] == 2 * 2 * tokens
    assert counts["without_gradient"] == tokens
    # The exact KL needs the logits of both, and again in the backward pass: they are never kept.
    assert counts["head"] == 2 * 4 * actions
    assert counts["optimizer_steps"] == 4


@pytest.mark.parametrize(
    ("algorithm", "epochs", "minibatches", "trunks", "reference"),
    [
        ("algorithm: {minibatches: 2}", 1, 2, 2, 1),
        ("algorithm: {minibatches: 1}", 1, 1, 2, 1),
        ("algorithm: {advantage: rloo, kl_coef: 0.05, kl_in: loss, ppo_epochs: 2}", 2, 1, 1, 1),
    ],
)
def test_ppo_prefills_a_prompt_once_and_never_scores_what_was_sampled(
    work: Any, chains: Path, algorithm: str, epochs: int, minibatches: int, trunks: int, reference: int
) -> None:
    """trunks: of policy and value model. Two prompts of ten tokens, four samples each, two steps."""
    counts, records = work("ppo", chains / "data/prompts.jsonl", "qa", GROUPS + algorithm)
    generated = int(records[-1]["tokens"])
    rows, prompts = 2 * 8, 2 * 2
    whole = prompts * 10 + generated  # a prompt once for its samples
    # Sampling: each prompt once for its samples, each token but the last of a sample; then reference and old values,
    # which a value model that sees the batch once gives as it is trained.
    sampling = prompts * 10 + generated - rows
    again = trunks == 2 and epochs * minibatches > 1
    assert counts["without_gradient"] == sampling + whole * (again + reference)
    # Each minibatch has samples of all prompts here.
    assert counts["with_gradient"] == (minibatches * prompts * 10 + generated) * trunks * epochs
    assert counts["head"] == generated * (1 + reference + epochs)
    assert counts["optimizer_steps"] == 2 * epochs * minibatches * trunks


def test_ppo_skips_groups_without_signal(work: Any, chains: Path) -> None:
    """Of an untrained model all answers are unreadable: equal rewards, no advantage, nothing to run but the sampler."""
    counts, records = work(
        "ppo", chains / "data/prompts.jsonl", "qa", GROUPS + "algorithm: {advantage: grpo, kl_coef: 0}"
    )
    generated = int(records[-1]["tokens"])
    assert [record["groups/skipped_tokens_fraction"] for record in records] == [1.0, 1.0]
    assert counts["without_gradient"] == 2 * 2 * 10 + generated - 2 * 8
    assert (counts["with_gradient"], counts["head"]) == (0, generated)
