"""Which families packs of rows are right for: each one against transformers' own attention, a row at a time."""

import json
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rlhfctl.architectures import UNSUPPORTED, longest_row, scaled, unsupported
from rlhfctl.errors import Refused
from rlhfctl.models import architecture
from rlhfctl.models.load import backbone, hidden_at_predictors, load_causal_lm, load_trunk
from rlhfctl.models.packing import pack
from rlhfctl.preflight.architecture import check_architecture
from rlhfctl.recipe.sections import Policy

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EVEN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
NARROW = SIZES | {"head_dim": 8}
WINDOW = NARROW | {"sliding_window": 8}
GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OLD = {"vocab_size": 100, "hidden_size": 32, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16}

RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet": ("BitNet", SIZES),
    "cohere": ("Cohere", SIZES),
    "cohere2": ("Cohere2", SIZES | {"sliding_window": 8}),
    "diffllama": ("DiffLlama", SIZES),
    "doge": ("Doge", SIZES),
    "exaone4": ("Exaone4", SIZES | {"sliding_window": 8}),
    "gemma": ("Gemma", NARROW),
    "gemma3_text": ("Gemma3Text", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("Glm", NARROW),
    "glm4": ("Glm4", NARROW),
    "gpt2": ("GPT2", GPT),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "gpt_neox": ("GPTNeoX", EVEN),
    "granite": ("Granite", SIZES),
    "llama": ("Llama", SIZES),
    "mistral": ("Mistral", SIZES | {"sliding_window": 8}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "olmo2": ("Olmo2", SIZES),
    "olmo3": ("Olmo3", SIZES | {"sliding_window": 8}),
    "opt": (
        "OPT",
        OLD | {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    ),
    "persimmon": ("Persimmon", EVEN),
    "phi": ("Phi", SIZES),
    "phi3": ("Phi3", SIZES),
    "qwen2": ("Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen2_moe": ("Qwen2Moe", SIZES | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    "qwen3": ("Qwen3", NARROW),
    "qwen3_moe": ("Qwen3Moe", NARROW | EXPERTS | {"num_experts": 4}),
    "smollm3": ("SmolLM3", SIZES),
    "starcoder2": ("Starcoder2", SIZES | {"sliding_window": 8}),
}
LINEAR = {f"linear_{side}": size for side, size in (("num_key_heads", 2), ("num_value_heads", 2))}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
HALF = {"layer_types": ["linear_attention", "full_attention"]}
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": ("Bamba", SIZES | {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]}),
    "bloom": ("Bloom", OLD | {"n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGen", GPT | {"rotary_dim": 8}),
    "falcon": ("Falcon", OLD | {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon_h1": ("FalconH1", SIZES | MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 8}),
    "falcon_mamba": ("FalconMamba", OLD | {"num_hidden_layers": 2, "state_size": 8}),
    "gemma2": ("Gemma2", WINDOW),
    "gpt_neo": (
        "GPTNeo",
        OLD | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_oss": ("GptOss", WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 8}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        SIZES
        | MAMBA
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 64},
    ),
    "jamba": (
        "Jamba",
        SIZES
        | {
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("Lfm2", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "mamba": ("Mamba", OLD | {"num_hidden_layers": 2, "state_size": 8}),
    "mamba2": ("Mamba2", OLD | {"num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8}),
    "minimax": ("MiniMax", NARROW | {"num_local_experts": 2}),
    "mpt": ("Mpt", {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "qwen3_5_text": ("Qwen3_5Text", NARROW | LINEAR | HALF),
    "recurrent_gemma": (
        "RecurrentGemma",
        EVEN | {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
    ),
    "rwkv": ("Rwkv", OLD | {"num_hidden_layers": 2, "context_length": 64}),
    "stablelm": ("StableLm", SIZES),
    "xglm": (
        "XGLM",
        {"vocab_size": 100, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    ),
}


def saved(family: str, keys: dict[str, Any], directory: Any) -> Any:
    """A checkpoint of random weights, large enough for every term to count; its configuration."""
    config = getattr(transformers, f"{family}Config")(**keys)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.15)
    model.save_pretrained(directory)
    return config


@pytest.mark.parametrize("kind", sorted(RIGHT))
def test_a_family_that_packs_are_right_for(kind, tmp_path, monkeypatch):
    config = saved(*RIGHT[kind], tmp_path)
    assert config.model_type == kind
    assert unsupported(config.to_dict()) is None
    monkeypatch.setattr(architecture, "TRIED", frozenset())
    monkeypatch.setattr(architecture, "TOLERANCES", {torch.float32: 1e-5})
    monkeypatch.setattr(architecture, "SAME", {torch.float32: 1e-6})
    load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", sorted(RIGHT))
def test_checkpointing_computes_what_is_sampled(kind, tmp_path, monkeypatch):
    """Whatever the configuration would drop in the mode of training, which checkpointing needs."""
    family, keys = RIGHT[kind]
    given = getattr(transformers, f"{family}Config")(**keys).to_dict()
    dropped = {name: 0.5 for name, value in given.items() if drops(name, value)}
    saved(family, keys | ({} if kind == "diffllama" else dropped), tmp_path)  # which refuses all but 0
    monkeypatch.setattr(architecture, "TRIED", frozenset())
    rows = [list(range(9)), list(range(20, 34))]
    batch = pack([0, 1], rows, [range(1, len(row)) for row in rows])
    plain, checkpointed = (
        load_trunk(str(tmp_path), torch.float32, torch.device("cpu"), gradient_checkpointing=on)
        for on in (False, True)
    )
    assert checkpointed.training
    expected, found = (hidden_at_predictors(trunk, batch) for trunk in (plain, checkpointed))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def drops(name: str, value: Any) -> bool:
    return isinstance(value, float) and ("drop" in name or "jitter" in name)


SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", SIZES),  # 0.0625 by default
    "cohere2": ("Cohere2", SIZES | {"logit_scale": 0.5}),
    "gemma3_text": ("Gemma3Text", NARROW | {"final_logit_softcapping": 3.0}),
    "granite": ("Granite", SIZES | {"logits_scaling": 8.0}),
}


@pytest.mark.parametrize("kind", sorted(SCALED))
def test_logits_that_are_scaled_or_capped_are_refused_of_a_language_model(kind, tmp_path, monkeypatch):
    """A loss over x W^T would be that of another model. A reward model reads no logits."""
    config = saved(*SCALED[kind], tmp_path)
    assert check_architecture("policy.path", "x", config.to_dict(), head=True)[0].id == "W025"
    assert check_architecture("reward.sources", "x", config.to_dict(), head=False) == []
    load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))
    with pytest.raises(Refused, match="logits are scaled or capped"):
        load_causal_lm(Policy(path=str(tmp_path), dtype="float32"), torch.device("cpu"), 0)


@pytest.mark.parametrize("kind", sorted(SCALED))
def test_logits_with_a_scale_of_one_are_not(kind, tmp_path):
    plain = {"logit_scale": 1.0, "final_logit_softcapping": None, "logits_scaling": 1.0}
    family, keys = SCALED[kind]
    config = saved(
        family,
        keys | {key: value for key, value in plain.items() if key in keys or kind == "cohere"},
        tmp_path,
    )
    assert scaled(json.loads((tmp_path / "config.json").read_text())) is None
    assert config.model_type == kind
    load_causal_lm(Policy(path=str(tmp_path), dtype="float32"), torch.device("cpu"), 0)


def test_every_family_that_is_not_proven_again_is_here():
    assert set(RIGHT) == architecture.TRIED


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_a_family_that_packs_are_wrong_for_is_refused(kind, tmp_path):
    """By its configuration, and by the model itself for what no list knows."""
    config = saved(*WRONG[kind], tmp_path)
    assert config.model_type == kind
    assert unsupported(json.loads((tmp_path / "config.json").read_text())) is not None
    with pytest.raises(Refused, match=r"not supported|another family"):
        load_causal_lm(Policy(path=str(tmp_path), dtype="float32"), torch.device("cpu"), 0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("lfm2", "it has layers of conv"),
        ("gpt_oss", "with sinks"),
        ("gemma2", "capped softly"),
        ("falcon", "code of their own"),
        ("bloom", "0 of its 2 layers"),
    ],
)
def test_the_reason_is_told(kind, reason, tmp_path):
    saved(*WRONG[kind], tmp_path)
    with pytest.raises(Refused, match=reason):
        load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("lfm2", "1 of its 2 layers attend by the layout"), ("falcon_h1", "computed from the row before it")],
)
def test_a_configuration_that_does_not_tell_is_found_out(kind, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "PLAIN", architecture.PLAIN | {"conv", "hybrid"})
    saved(*WRONG[kind], tmp_path)
    with pytest.raises(Refused, match=reason):
        load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))


def test_a_wrong_scale_is_seen(tmp_path, monkeypatch):
    """A family that no list knows, whose attention is handed over with another meaning."""
    saved(*RIGHT["llama"], tmp_path)
    monkeypatch.setattr(architecture, "TRIED", frozenset())
    kept = architecture.PackedLayout.attend
    monkeypatch.setattr(
        architecture.PackedLayout,
        "attend",
        lambda self, layer, query, key, value, scale, window: kept(
            self, layer, query, key, value, scale / 2, window
        ),
    )
    with pytest.raises(Refused, match="hidden states differ by"):
        load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("older", [False, True])
def test_rows_are_as_long_as_longrope_reads_by_its_short_factors(older, tmp_path):
    """A row of 16 tokens is the same beside one of 17 only where that one is left out."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0} | factors
    keys = {"num_key_value_heads": 4, "original_max_position_embeddings": 16, "rope_parameters": rope}
    given = saved("Phi3", EVEN | keys, tmp_path).to_dict()
    if older:  # as Phi-3.5 was published
        given["rope_scaling"] = {"type": "longrope"} | factors
        del given["rope_parameters"]
    assert longest_row(given) == 16
    trunk = load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))
    rows = [list(range(16)), list(range(30, 46)), list(range(50, 67))]
    with torch.no_grad():
        alone, beside, behind = (
            hidden_at_predictors(trunk, pack(chosen, rows, [range(1, len(row)) for row in rows]))[:15]
            for chosen in ([0], [0, 1], [0, 2])
        )
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)
    assert float((behind - alone).abs().max()) > 1e-2


def test_rows_of_other_models_are_as_long_as_their_context():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert longest_row(SIZES | {"rope_scaling": yarn}) == 64
    assert longest_row({"n_positions": 32}) == 32
    assert longest_row({"text_config": SIZES}) == 64
    assert longest_row({}) is None


def test_the_proof_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    saved(*RIGHT["qwen2"], tmp_path)
    known = load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(architecture, "TRIED", frozenset())
    proven = load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))
    assert proven.config._attn_implementation == architecture.NAME
    rows = [torch.arange(5, 15), torch.arange(30, 50)]
    for one, other in zip(
        architecture.packed(known, rows)[0], architecture.packed(proven, rows)[0], strict=True
    ):
        assert torch.equal(one, other)


def test_bfloat16_is_proven_as_well(tmp_path, monkeypatch):
    saved(*RIGHT["llama"], tmp_path)
    monkeypatch.setattr(architecture, "TRIED", frozenset())
    assert backbone(load_trunk(str(tmp_path), torch.bfloat16, torch.device("cpu"))).dtype == torch.bfloat16
    saved(*WRONG["falcon_h1"], tmp_path / "state")
    with pytest.raises(Refused, match="not supported"):
        load_trunk(str(tmp_path / "state"), torch.bfloat16, torch.device("cpu"))


def test_layers_of_a_kind_that_no_list_knows():
    assert unsupported({"model_type": "new", "layer_types": ["full_attention", "sliding_attention"]}) is None
    assert unsupported({"model_type": "new", "layer_types": ["full_attention", "wavelet"]}) is not None
    nested = {"model_type": "both", "text_config": {"model_type": "qwen3_5_text"}}
    assert unsupported(nested) == ("qwen3_5_text", UNSUPPORTED["qwen3_5_text"])


def test_the_page_lists_what_was_tried(repo):
    page = (repo / "docs/preflight.md").read_text()
    listed = page[page.index("Tried against") : page.index("and encoders as reward models")]
    assert set(
        listed[listed.index(":") + 1 : listed.index("(`model_type`")]
        .replace("\n", " ")
        .replace(" ", "")
        .split(",")
    ) == set(architecture.TRIED)


@pytest.mark.parametrize("kind", ["gemma3_text", "starcoder2"])  # which layers slide: told, and not told
def test_a_window_wider_than_the_proof_has_to_reach_the_attention(kind, tmp_path, monkeypatch):
    """No row of the proof is longer than such a window: the layer has to hand it over."""
    family, keys = RIGHT[kind]
    saved(family, keys | {"sliding_window": 4096, "max_position_embeddings": 8192}, tmp_path)
    monkeypatch.setattr(architecture, "TRIED", frozenset())
    load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))
    attend = architecture.Watched.attend
    monkeypatch.setattr(architecture.Watched, "attend", lambda self, *given: attend(self, *given[:-1], None))
    with pytest.raises(Refused, match="window is not given"):
        load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))


def test_layers_of_chunks_are_refused(tmp_path, monkeypatch):
    """Rows beyond a chunk would attend to too much; the chunk of Llama 4 is longer than any row of the proof."""
    assert unsupported({"model_type": "llama4_text", "layer_types": ["chunked_attention"]}) is not None
    saved(*RIGHT["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["chunked_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="layers of chunked_attention"):
        load_trunk(str(tmp_path), torch.float32, torch.device("cpu"))
