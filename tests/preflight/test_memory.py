"""The estimate of memory: its parts against models that exist, its peak against a real run, and what it proposes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models.head import CHUNK_ELEMENTS
from rlhfctl.models.load import backbone, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import add_lora
from rlhfctl.models.packing import pack
from rlhfctl.preflight import memory
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.memory import Shards, estimate, layer_elements, lora_parameters, shape_of
from rlhfctl.preflight.shards import shards_of
from rlhfctl.recipe.sections import Policy
from rlhfctl.recipe.tasks import TASKS

GIB = 1 << 30
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def recipe(task: str = "sft", **sections: Any) -> Any:
    base: dict[str, Any] = {
        "task": task,
        "name": "x",
        "policy": {"path": "p"},
        "data": {"train": [{"path": "f"}], "max_length": 256},
        "train": {"steps": 1, "batch_size": 64, "tokens_per_microbatch": 4096},
    }
    if task == "ppo":
        base["rollout"] = {"n": 4}
        base["reward"] = {"sources": [{"kind": "verifier", "name": "math_answer"}]}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return TASKS[task].model_validate(base)


def config(**keys: Any) -> dict[str, Any]:
    return LlamaConfig(**{**SIZES, **keys}).to_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tied: bool) -> None:
    plain = config(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    shape = shape_of(plain)
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.trunk == sum(p.numel() for p in backbone(model).parameters())
    with_lora = recipe(policy={"lora": {"rank": 4}})
    add_lora(model, with_lora.policy.lora, 0)
    assert lora_parameters(with_lora, shape) == sum(
        p.numel() for n, p in model.named_parameters() if "lora" in n
    )


@pytest.mark.parametrize(
    ("dtype", "lora"), [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
)
def test_activations_are_what_autograd_keeps(tmp_path: Path, dtype: str, lora: bool) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    policy = Policy.model_validate({"path": str(tmp_path), "dtype": dtype})
    model = load_causal_lm(policy, torch.device("cpu"), 0)
    if lora:
        add_lora(model, recipe(policy={"lora": {"rank": 2}}).policy.lora, 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = [[5] * 128 for _ in range(4)]
    one = pack(range(4), rows, [list(range(1, 128))] * 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = hidden_at_predictors(backbone(model), one)
    shape = shape_of(config())
    assert shape is not None
    expected = 512 * shape.layers * layer_elements(shape, 2 if dtype == "bfloat16" else 4, lora, True)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)
    assert hidden.requires_grad


def test_sums_by_hand() -> None:
    """P 1,000 x 64 twice and the layers; everything else of the closed formulas."""
    found = estimate(recipe(), config(vocab_size=1000), bfloat16=False)
    assert found is not None
    shape = shape_of(config(vocab_size=1000))
    assert shape is not None
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176 + 2 * 64
    assert shape.parameters == 2 * 1000 * 64 + 3 * layer + 64
    assert (found.weights, found.gradients) == (4 * shape.parameters, 4 * shape.parameters)
    assert found.optimizer == 8 * shape.parameters
    kept = 3 * 4 * (6 * 64 + 5 * 64 + 4 * 176)
    assert found.activations == 4096 * (kept + 4 * 4 * 64 + 4 * (3 * 176 + 2 * 64))
    assert found.logits == 2 * 4096 * 1000 * 4 + 2 * 1000 * 64 * 4
    assert found.peak > 4 * found.weights + found.activations + found.logits
    assert memory.CHUNK_ELEMENTS == CHUNK_ELEMENTS


def peak(task: str = "sft", bfloat16: bool = False, plain: Any = None, **sections: Any) -> int:
    found = estimate(recipe(task, **sections), plain or config(), bfloat16)
    assert found is not None
    return found.peak


def test_what_makes_it_smaller() -> None:
    whole = peak()
    assert peak(train={"tokens_per_microbatch": 1024}) < whole
    assert peak(policy={"gradient_checkpointing": True}) < whole
    assert peak(policy={"lora": {"rank": 4}}) < whole
    assert peak(bfloat16=True) < whole
    assert peak(plain=config(vocab_size=152_064)) > 4 * whole
    free = peak("ppo", algorithm={"advantage": "grpo", "kl_coef": 0.0})
    held = peak("ppo", algorithm={"advantage": "grpo", "kl_coef": 0.1})
    assert held > free
    assert peak("ppo", algorithm={"advantage": "gae", "kl_coef": 0.1}) > held


def test_shards_divide_what_they_name() -> None:
    whole = estimate(recipe(), config(), False)
    parts = estimate(recipe(), config(), False, shards=Shards(weights=2, gradients=4, optimizer=8))
    assert whole is not None
    assert parts is not None
    assert (parts.weights * 2, parts.gradients * 4, parts.optimizer * 8) == (
        whole.weights,
        whole.gradients,
        whole.optimizer,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_each_stage_of_zero_holds(stage: int) -> None:
    """P parameters on 4 ranks in float32; a bucket of 1,000 gradients."""
    spec = {"zero_stage": stage} | ({"bucket_elements": 1000} if stage else {})
    sharded = recipe(deepspeed=spec)
    found = estimate(sharded, config(), False, world=4, shards=shards_of(sharded, 4))
    shape = shape_of(config())
    assert found is not None
    assert shape is not None
    p = shape.parameters
    assert found.weights == (p if stage == 3 else 4 * p)
    assert found.gradients == (p if stage >= 2 else 4 * p)
    assert found.optimizer == (8 * p if stage == 0 else 3 * p)
    assert found.zero_buffers == (4000 if stage >= 2 else 0) + (4 * p if stage == 3 else 0)


def test_rollouts_of_the_trainers_own_module_want_the_whole_policy() -> None:
    cached = {}
    for engine in ("hf", "vllm"):
        for stage in (2, 3):
            sharded = recipe("ppo", deepspeed={"zero_stage": stage}, rollout={"engine": engine})
            found = estimate(sharded, config(), False, world=4, shards=shards_of(sharded, 4))
            assert found is not None
            cached[engine, stage] = found.kv_cache
    shape = shape_of(config())
    assert shape is not None
    assert cached["hf", 3] - cached["hf", 2] == 4 * shape.parameters
    assert cached["vllm", 3] == cached["vllm", 2]


def test_an_architecture_that_it_does_not_know() -> None:
    assert estimate(recipe(), {"model_type": "gpt2", "n_embd": 4}, False) is None


Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """check(free, **sections): findings by id on a machine with so many bytes free."""
    (tmp_path / "config.json").write_text(json.dumps(config(vocab_size=32_000, hidden_size=512)))

    def run(free: int, **sections: Any) -> dict[str, Any]:
        monkeypatch.setattr(Inputs, "machine", SimpleNamespace(memory=free, usable_gpus=()))
        inputs = Inputs(recipe(**{"policy": {"path": str(tmp_path)}, **sections}), None, True)
        return {finding.id: finding for finding in memory.check(inputs)}

    return run


def test_it_says_what_it_needs_and_the_smallest_change_that_fits(check: Check, tmp_path: Path) -> None:
    roomy = check(64 * GIB)
    assert set(roomy) == {"X040"}
    needed = roomy["X040"].evidence["peak"]
    assert "activations" in roomy["X040"].detail
    tight = check(int((needed + memory.RUNTIME) / memory.CLOSE) - (16 << 20))["X041"]
    assert tight.severity == "warning"
    assert tight.fix.startswith("train.tokens_per_microbatch=2048: about ")
    alone = {"batch_size": 1, "tokens_per_microbatch": 256}
    needed = check(64 * GIB, train=alone)["X040"].evidence["peak"]
    tighter = check(int((needed + memory.RUNTIME) / memory.CLOSE) - 1000, train=alone)["X041"]
    assert tighter.fix.startswith("policy.gradient_checkpointing=true: about ")
    alone |= {"batch_size": 2}
    checkpointed = {"train": alone, "policy": {"path": str(tmp_path), "gradient_checkpointing": True}}
    two = {**checkpointed, "launch": {"nproc_per_node": 2}}
    needed = check(64 * GIB, **two)["X040"].evidence["peak"]
    shared = check(int((needed + memory.RUNTIME) / memory.CLOSE) * 2 - 4000, **two)["X041"]
    assert shared.fix.startswith("deepspeed.zero_stage=1: about ")
    assert check(GIB // 2)["X041"].fix.startswith("no single change makes it fit")


@pytest.mark.heavy
def test_the_estimate_is_within_a_fifth_of_a_real_run(repo: Path) -> None:
    """benchmarks/memory.py runs the other configurations."""
    command = [sys.executable, "-m", "benchmarks.memory", "--only", "sft"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=600)
    found = json.loads(done.stdout)
    assert 0.8 <= found["ratio"] <= 1.25, found
