"""The estimate of memory: its parts against models that exist, its peak against a real run, and what it proposes."""

import json
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhfctl.models import head, head_tiles, pack_attention
from rlhfctl.models.load import backbone, hidden_at_predictors, load_causal_lm
from rlhfctl.models.lora import add_lora
from rlhfctl.models.packing import pack
from rlhfctl.preflight import memory, memory_terms
from rlhfctl.preflight.decoder import lora_parameters, shape_of
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.preflight.memory import Shards, estimate
from rlhfctl.preflight.memory_terms import layer_activations
from rlhfctl.preflight.shards import shards_of
from rlhfctl.recipe.sections import Policy
from rlhfctl.recipe.tasks import TASKS
from rlhfctl.trainers import optimizer
from rlhfctl.trainers.distributed import sum_gradients

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
    assert lora_parameters(with_lora.policy.lora, shape) == sum(
        p.numel() for n, p in model.named_parameters() if "lora" in n
    )


@pytest.mark.parametrize(
    ("dtype", "lora"), [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
)
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, dtype: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without units for bfloat16 tiles: with them the outputs of attention take half as much."""
    monkeypatch.setattr(pack_attention, "multiplies_tiles", lambda: False)
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
    layer = layer_activations(shape, 2 if dtype == "bfloat16" else 4, 512, lora, True)
    expected = shape.layers * layer.total
    assert sum(kept.values()) == pytest.approx(expected, rel=0.06)
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
    kept = 3 * 4 * (4 * 64 + 2 * 64 + 2 * 32 + 2 * 176)
    assert found.activations == 4096 * (kept + 4 * 4 * 64 + 4 * (3 * 176 + 2 * 64))
    assert found.logits == 2 * 4096 * 1000 * 4 + 2 * 1000 * 64 * 4
    assert found.peak > 4 * found.weights + found.activations + found.logits


def logits(task: str, vocabulary: int, cpu: bool = True, **sections: Any) -> int:
    found = estimate(recipe(task, **sections), config(vocab_size=vocabulary), False, cpu)
    assert found is not None
    return found.logits


def test_a_large_head_goes_in_tiles_and_its_gradient_is_made_once() -> None:
    """T 4,096 tokens: three tiles of 512 logits and three rows of 64 for each; V x 64 elements of a gradient."""
    table = 40_000 * 64 * 4
    tiles = 3 * 4096 * (512 + 64) * 4
    assert logits("sft", 40_000) == tiles  # added to the gradient of the packs before
    assert logits("sft", 40_000, train={"batch_size": 16}) == tiles + table  # a lone pack makes it
    assert logits("sft", 40_000, deepspeed={"zero_stage": 1}) == tiles + table  # not the engine's own tensor
    assert logits("sft", 40_000, policy={"lora": {"rank": 4}}) == tiles
    # Chunks of 2^24 logits and two matrices: a smaller head, oreo's, and a GPU's.
    assert logits("sft", 32_000) == 2 * (2**24 // 32_000) * 32_000 * 4 + 2 * 32_000 * 64 * 4
    assert logits("oreo", 40_000) == 2 * (2**24 // 40_000) * 40_000 * 4 + 2 * table
    assert logits("sft", 40_000, cpu=False) == 2 * (2**24 // 40_000) * 40_000 * 4 + 2 * table


def test_a_last_layer_that_is_read_at_the_end_of_rows_keeps_its_attention_alone() -> None:
    """3 layers of 4 H + 2 A + 2 K + 2 I, with ZeRO-3 3 I; a reward model's last one 2 H + 2 A + 2 K, not run again or
    in parts."""
    rest = 4 * (4 * 64 + 3 * 176 + 2 * 64)
    layer, last = 4 * (4 * 64 + 2 * 64 + 2 * 32 + 2 * 176), 4 * (2 * 64 + 2 * 64 + 2 * 32)
    for expected, sections in (
        (2 * layer + last, {}),
        (3 * layer, {"algorithm": {"score": "token_sum"}}),
        (3 * (layer + 4 * 176), {"deepspeed": {"zero_stage": 3}}),
    ):
        found = estimate(recipe("rm", **sections), config(), False)
        assert found is not None
        assert found.activations == 4096 * (expected + rest)


def test_an_entropy_bonus_and_several_chunks_hold_more() -> None:
    """V 32,000: a pack of 512 tokens is one chunk, whose product is the head's gradient."""
    table = 32_000 * 64 * 4
    assert logits("ppo", 32_000, train={"tokens_per_microbatch": 512}) == 2 * 512 * 32_000 * 4 + table
    chunk = (2**24 // 32_000) * 32_000 * 4
    assert logits("ppo", 32_000) == 2 * chunk + 2 * table
    assert logits("ppo", 32_000, algorithm={"entropy_coef": 0.01}) == 4 * chunk + 2 * table


def test_samples_of_one_prompt_hold_its_keys_each() -> None:
    """Prompts of 192 tokens and n = 4 responses of 64: 448 pass, and keys and values of 1,024 are there."""
    assert memory_terms.repeated_keys(recipe("ppo", rollout={"max_new_tokens": 64})) == 1024 / 448
    assert memory_terms.repeated_keys(recipe("ppo", rollout={"max_new_tokens": 64, "n": 1})) == 1
    assert memory_terms.repeated_keys(recipe("ppo", rollout={"max_new_tokens": 250})) == 1  # 6 of a prompt
    few = recipe("ppo", rollout={"max_new_tokens": 64}, train={"batch_size": 16})
    assert memory_terms.pack_tokens(few, 1) == (4 * 448, False)
    halves = recipe(
        "ppo", rollout={"max_new_tokens": 64}, train={"batch_size": 16}, algorithm={"minibatches": 2}
    )
    assert memory_terms.pack_tokens(halves, 1) == (1280, False)  # 4 x (192 + 2 x 64) of 8 rows
    longer = recipe("ppo", rollout={"max_new_tokens": 64, "max_prompt_length": 448})
    assert (memory_terms.row_length(longer), memory_terms.repeated_keys(longer)) == (512, 2048 / 704)


def test_a_value_model_that_passes_once_leaves_its_gradients_beside_the_policys_pack() -> None:
    """One pack of 16 rows. Passed again in each of two epochs, they are there only once the policy's graph is freed."""
    one = {"batch_size": 16}
    once = peak("ppo", train=one)
    again = peak("ppo", train=one, algorithm={"ppo_epochs": 2})
    shape = shape_of(config())
    assert shape is not None
    assert once - again == pytest.approx(1.4 * 4 * (shape.trunk + shape.hidden), abs=2)


def test_a_value_model_over_the_policys_own_backbone_is_an_adapter() -> None:
    lora = {"lora": {"rank": 4}}
    on_both = recipe("ppo", policy=lora, value_model=lora)
    found = estimate(on_both, config(), False)
    shape = shape_of(config())
    assert found is not None
    assert shape is not None
    assert found.value_model == 16 * (lora_parameters(on_both.policy.lora, shape) + shape.hidden)


def test_an_implicit_reward_model_is_trained_beside_its_start() -> None:
    found = estimate(recipe("ppo", algorithm={"advantage": "prime", "kl_coef": 0.0}), config(), False)
    shape = shape_of(config())
    assert found is not None
    assert shape is not None
    assert found.implicit_prm == (16 + 4) * shape.parameters


def test_sizes_that_the_training_side_has_too() -> None:
    assert memory_terms.CHUNK_ELEMENTS == head.CHUNK_ELEMENTS
    assert (memory_terms.TILE, memory_terms.LARGE) == (head_tiles.TILE, head_tiles.LARGE)
    assert memory_terms.CAST_ELEMENTS == optimizer.CAST_ELEMENTS
    assert signature(sum_gradients).parameters["bucket_elements"].default == memory_terms.REDUCED


def peak(task: str = "sft", bfloat16: bool = False, plain: Any = None, **sections: Any) -> int:
    found = estimate(recipe(task, **sections), plain or config(), bfloat16)
    assert found is not None
    return found.peak


def test_what_makes_it_smaller() -> None:
    whole = peak()
    assert peak(train={"tokens_per_microbatch": 1024}) < whole
    assert peak(policy={"gradient_checkpointing": True}) < whole
    # Of long packs LoRA keeps more: the input of each MLP's last product, which a whole matrix's gradient makes again.
    few = {"tokens_per_microbatch": 256}
    assert peak(train=few, policy={"lora": {"rank": 4}}) < peak(train=few)
    assert peak(bfloat16=True) < whole
    assert peak(plain=config(vocab_size=152_064)) > 3 * whole
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


@pytest.mark.parametrize(("library", "copies"), [("torch", 1), ("onednn", 1), ("packed", 2)])
def test_rollouts_of_the_trainers_own_module_want_the_policys_matrices(
    library: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused, all but the embedding, and once more in MKL's order; at ZeRO-3 the whole policy, gathered."""
    monkeypatch.setenv("RLHFCTL_MATMUL", library)
    cached = {}
    for engine in ("hf", "vllm"):
        for stage in (2, 3):
            sharded = recipe("ppo", deepspeed={"zero_stage": stage}, rollout={"engine": engine})
            found = estimate(sharded, config(), False, world=4, shards=shards_of(sharded, 4))
            assert found is not None
            cached[engine, stage] = found.kv_cache
    shape = shape_of(config())
    assert shape is not None
    assert cached["hf", 2] - cached["vllm", 2] == copies * 4 * shape.trunk
    assert cached["hf", 3] - cached["vllm", 3] == 4 * shape.parameters
    assert cached["vllm", 3] == cached["vllm", 2]


@pytest.mark.parametrize(
    ("stage", "world", "half", "expected"),
    [
        (None, 1, False, 0),
        (None, 1, True, 4 * memory_terms.CAST_ELEMENTS),
        (None, 2, False, 4 * (memory_terms.REDUCED + 1000)),
        (0, 2, False, 4 * 10**8),  # all of them together
        (1, 2, False, 0),  # half of the gradients and as much flat: no more than what was there
        (1, 1, False, 4 * 10**8),
        (2, 4, True, 6 * 10**8 // 4),  # flat in bfloat16, then in float32
        (3, 4, False, 4 * 10**8 // 4),
    ],
)
def test_an_optimizer_step_beside_the_gradients(
    stage: int | None, world: int, half: bool, expected: int
) -> None:
    """10^8 parameters, the largest matrix of 1,000."""
    ours = recipe() if stage is None else recipe(deepspeed={"zero_stage": stage})
    divided, width = world if stage else 1, 2 if half else 4
    held = 10**8 * width // (world if stage in (2, 3) else 1)
    assert memory_terms.step_bytes(ours, 10**8, width, 1000, world, divided, held) == expected


@pytest.mark.parametrize(
    ("stage", "offload", "cpu", "stays"),
    [
        (
            1,
            "optimizer",
            True,
            (4, 4, 3),
        ),  # whole weights and gradients; 8 + 4 of a part, and its gradients in float32
        (2, "optimizer", True, (4, 0, 3)),
        (3, "optimizer", True, (1, 1, 3)),
        (3, "all", True, (1, 1, 3)),
        (2, "optimizer", False, (4, 0, 0)),
        (3, "all", False, (0, 1, 0)),
    ],
)
def test_what_offload_keeps_and_where(
    stage: int, offload: str, cpu: bool, stays: tuple[int, int, int]
) -> None:
    """P parameters on 4 ranks in float32, one pack a step. Below ZeRO-3 also P / 4 weights on their way back and a
    buffer of the largest matrix. On a GPU what is offloaded is in CPU memory and not in the peak."""
    spec = {"zero_stage": stage, "offload": offload, "bucket_elements": 1000}
    sharded = recipe(deepspeed=spec, train={"batch_size": 16})
    found = estimate(sharded, config(), False, cpu, world=4, shards=shards_of(sharded, 4))
    shape = shape_of(config())
    assert found is not None
    assert shape is not None
    p = shape.parameters
    weights, gradients, moments = stays
    buffers = p + 4 * shape.table if stage < 3 else 0
    kept = 12 * (p // 4) + 4 * (p // 4) + buffers
    assert (found.weights, found.gradients) == (weights * p, gradients * p)
    assert found.optimizer == (kept if moments else 0)
    assert found.offloaded == (0 if cpu else kept + (p if offload == "all" else 0))


def test_quantised_matrices_under_an_adapter() -> None:
    """A byte a weight, or half of one and a float32 scale for 64; one matrix at a time is dequantised."""
    shape = shape_of(config())
    assert shape is not None
    matrices = shape.layers * sum(rows * columns for rows, columns in shape.linear.values())
    whole = estimate(recipe(policy={"lora": {"rank": 4}}), config(), False)
    assert whole is not None
    for kind, kept, dense in (("int8", 1.0, 8), ("nf4", 0.5 + 4 / 64, 4)):
        found = estimate(recipe(policy={"lora": {"rank": 4}, "quantization": kind}), config(), False)
        assert found is not None
        assert whole.weights - found.weights == int(matrices * (4 - kept))
        assert found.activations - whole.activations == 176 * 64 * dense


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
