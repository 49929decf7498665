"""The written-out decode against the module, token by token, and what it leaves to the module."""

import copy

import pytest
import tiny_sizes
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from rlhfctl.models import attention
from rlhfctl.models.linear import onednn_is_faster
from rlhfctl.models.load import prepare
from rlhfctl.models.lora import add_lora
from rlhfctl.recipe.sections import Lora
from rlhfctl.rollout import decode, hf, prompt_once
from rlhfctl.rollout.decode import FusedWeights, StaticDecoder, uncovered
from rlhfctl.rollout.types import Request, Sampling

SIZES = tiny_sizes.SIZES | {"vocab_size": 61}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-no-groups": LlamaConfig(**SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-one-key-head": LlamaConfig(**SIZES | {"num_key_value_heads": 1}, head_dim=16),
    "llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear-rope": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-3),
}


def build(config, dtype=torch.float32, lora=False):
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that tell a missing one
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
            else:
                parameter.mul_(5)
    model = prepare(model.to(dtype), torch.device("cpu"))
    if lora:
        add_lora(model, Lora.model_validate({"rank": 4}), 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=["torch", "onednn", "packed"])
def library(request, monkeypatch):
    """All ways to keep the matrices, on every processor, for few steps and rows as well."""
    monkeypatch.setattr(decode, "PAYS", 1)
    monkeypatch.setattr(decode, "FEWEST", 2)
    monkeypatch.setenv("RLHFCTL_MATMUL", request.param)
    onednn_is_faster.cache_clear()
    yield request.param
    onednn_is_faster.cache_clear()


def decoded(make, config, new=12):
    """Log-probabilities of fixed tokens after three prompts, 2 to 4 rows each; rows leave on the way."""
    generator = torch.Generator().manual_seed(3)
    lengths, owner = torch.tensor([3, 9, 5]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    ids = torch.randint(0, 61, (3, 9), generator=generator)
    drawn = torch.randint(0, 61, (len(owner), new), generator=generator)
    decoder = make(owner, lengths, 9, new)
    live, position = torch.arange(len(owner)), lengths[owner]
    found = [decoder.prefill(ids).float()]
    for step in range(new - 1):
        if step in (3, 4, 8):
            ended = torch.zeros(len(live), dtype=torch.bool)
            ended[torch.tensor([1, len(live) - 2])] = True
            order = hf.without(ended)
            live, position = live[order], position[order]
            decoder.select(order)
        found.append(
            torch.zeros(len(owner), 61).index_put((live,), decoder.step(drawn[live, step], position).float())
        )
        position = position + 1
    assert len(live) == 3
    return torch.stack(found).log_softmax(-1)


@pytest.mark.parametrize("worth", [1, 128], ids=["prompts-once", "prompts-by-row"])
@pytest.mark.parametrize(
    ("name", "lora"), [*((name, False) for name in CONFIGS), ("llama-biases", True), ("qwen2", True)]
)
@torch.no_grad()
def test_equal_to_the_module(library, name, lora, worth, monkeypatch):
    monkeypatch.setattr(prompt_once, "WORTH", worth)
    model = build(CONFIGS[name], lora=lora)
    assert uncovered(model) is None
    weights = FusedWeights(model)
    assert weights.onednn == (library == "onednn")
    rows: list[int] = []
    pack = weights.pack
    monkeypatch.setattr(weights, "pack", lambda count: (rows.append(count), pack(count)))
    ours = decoded(lambda *batch: StaticDecoder(weights, *batch), CONFIGS[name])
    module = decoded(lambda *batch: hf.ModuleDecoder(model, *batch), CONFIGS[name])
    torch.testing.assert_close(ours, module, atol=1e-5, rtol=0)
    assert module.std(-1).mean() > 0.2
    assert rows == ([9, 3] if library == "packed" else [9])
    assert weights.packed_rows == (3 if library == "packed" else 0)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_the_module():
    model = build(CONFIGS["qwen2"], torch.bfloat16)
    exact = decoded(lambda *batch: hf.ModuleDecoder(model.float(), *batch), CONFIGS["qwen2"])
    model = model.bfloat16()
    weights = FusedWeights(model)
    ours = decoded(lambda *batch: StaticDecoder(weights, *batch), CONFIGS["qwen2"])
    module = decoded(lambda *batch: hf.ModuleDecoder(model, *batch), CONFIGS["qwen2"])
    print((ours - exact).abs().mean(), (module - exact).abs().mean())
    assert (ours - exact).abs().mean() < 1.2 * (module - exact).abs().mean() < 0.2


def test_samples_are_the_modules(monkeypatch):
    model = build(CONFIGS["llama"])
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(9, 61, (length,), generator=generator).tolist() for length in (4, 11, 6)]
    requests = [Request(index, prompts[index // 4]) for index in range(12)]
    sampling = Sampling(20, 0.8, 1.0, (7, 8), 5, 1, 4096)
    ours = hf.generate(model, requests, sampling)
    monkeypatch.setattr(hf, "uncovered", lambda model: "a test")
    module = hf.generate(model, requests, sampling)
    assert [(r.response_ids, r.finish) for r in ours] == [(r.response_ids, r.finish) for r in module]
    assert len({len(r.response_ids) for r in ours}) > 3


def test_an_update_is_seen_by_the_next_call():
    model = build(CONFIGS["qwen2"])
    sampling = Sampling(8, 1.0, 1.0, (), 5, 1, 4096)
    before = hf.generate(model, [Request(0, [3, 4, 5])], sampling)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    after = hf.generate(model, [Request(0, [3, 4, 5])], sampling)
    assert before[0].response_ids != after[0].response_ids


def hooked(model):
    model.base_model.layers[0].mlp.register_forward_hook(lambda *_: None)


def of_another_kind(model):
    class Scaled(nn.Linear):
        pass

    model.base_model.layers[1].mlp.up_proj.__class__ = Scaled


def divided(model):
    next(model.parameters()).ds_id = 1


def left_out(model):
    model.base_model.layers[0].self_attn.q_proj.enable_adapters(False)


def merged(model):
    model.base_model.layers[1].mlp.down_proj.merge()


WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("config", "lora", "dtype", "change", "reason"),
    [
        (MistralConfig(**SIZES), False, torch.float32, None, "MistralModel is not of"),
        (Qwen2Config(**SIZES, **WINDOW), False, torch.float32, None, "sliding-window"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            False,
            torch.float32,
            None,
            "rope scaling dynamic",
        ),
        (CONFIGS["llama"], True, torch.bfloat16, None, "LoRA over bfloat16"),
        (CONFIGS["llama"], False, torch.float32, hooked, "a hook"),
        (CONFIGS["llama"], False, torch.float32, of_another_kind, "Scaled layers"),
        (CONFIGS["llama"], False, torch.float32, divided, "ZeRO-3"),
        (CONFIGS["llama"], True, torch.float32, left_out, "an adapter of another kind"),
        (CONFIGS["llama"], True, torch.float32, merged, "an adapter of another kind"),
        (CONFIGS["llama"], False, torch.float16, None, "float16"),
    ],
)
def test_what_the_module_keeps(config, lora, dtype, change, reason):
    model = build(config, dtype, lora)
    if change is not None:
        change(model)
    assert reason in uncovered(model)


@pytest.mark.parametrize("owner", [[1, 0, 2, 1, 0, 1], [0, 0, 1, 1, 2, 2]], ids=["mixed", "in order"])
@torch.no_grad()
def test_rows_of_one_prompt_need_not_be_neighbours(owner, monkeypatch):
    """Slots are found by prompt; a row that reads another prompt's keys, or a stale slot, gives other numbers."""
    monkeypatch.setattr(prompt_once, "WORTH", 1)
    model = build(CONFIGS["qwen2"])
    owner, lengths = torch.tensor(owner), torch.tensor([3, 5, 2])
    ids = torch.randint(9, 61, (3, 5), generator=torch.Generator().manual_seed(5))
    weights, found = FusedWeights(model), []
    for decoder in (
        StaticDecoder(weights, owner, lengths, 5, 3),
        hf.ModuleDecoder(model, owner, lengths, 5, 3),
    ):
        assert getattr(decoder, "prompts", None) is not None or isinstance(decoder, hf.ModuleDecoder)
        logits = [decoder.prefill(ids), decoder.step(torch.arange(20, 26), lengths[owner])]
        decoder.select(torch.tensor([0, 5, 2, 3]))  # row 5 in the place of row 1, row 4 is no more
        logits.append(decoder.step(torch.arange(30, 34), lengths[owner[[0, 5, 2, 3]]] + 1))
        found.append(torch.cat(logits).log_softmax(-1))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("live", "left", "computed", "packed"),
    [
        (32, 20, 32, 32),
        (25, 20, 32, 32),
        (24, 20, 24, 32),
        (17, 20, 17, 32),
        (16, 20, 16, 16),
        (16, 15, 16, 32),
        (4, 20, 4, 4),
        (3, 20, 3, 32),
    ],
)
@torch.no_grad()
def test_rows_that_go_along_in_mkl_s_order(live, left, computed, packed, monkeypatch):
    """Finished rows are computed down to three quarters of those that the matrices were laid out for; at half of them
    these are laid out again, where steps and rows enough are left."""
    monkeypatch.setenv("RLHFCTL_MATMUL", "packed")
    weights = FusedWeights(build(CONFIGS["llama"]))
    decoder = StaticDecoder(weights, torch.zeros(32, dtype=torch.long), torch.tensor([3]), 3, left)
    decoder.filled = decoder.cache.shape[-2] - left
    weights.pack(32)
    assert decoder.computed(live) == computed
    assert weights.packed_rows == packed
    assert {(each.qkv.rows, each.qkv.packed is None) for each in weights.layers} == {(packed, False)}
    weights.pack(0)
    assert decoder.computed(live) == live
    assert weights.logits.packed is None
