"""Weights that the configuration has no place for are refused; what stands beside the model is not."""

import json

import pytest
import tiny_sizes
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhfctl.errors import Refused
from rlhfctl.models.load import load_causal_lm, load_trunk
from rlhfctl.models.reward_training import load_for_training
from rlhfctl.recipe.sections import Policy

CPU = torch.device("cpu")
LOADERS = {
    "policy": lambda path: load_causal_lm(Policy(path=str(path), dtype="float32"), CPU, 0),
    "value or reward model": lambda path: load_trunk(str(path), torch.float32, CPU),
    "rm": lambda path: load_for_training(Policy(path=str(path), dtype="float32"), "zero", CPU, 0),
}
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tiny_sizes.SIZES, vocab_size=97)).save_pretrained(tmp_path)
    return tmp_path


def configure(directory, **keys):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def add(directory, **tensors):
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_layers_beyond_those_of_the_configuration(checkpoint, load):
    """As a configuration of a smaller model leaves them: a model of fewer layers would be trained."""
    layers = tiny_sizes.SIZES["num_hidden_layers"]
    configure(checkpoint, num_hidden_layers=layers - 1)
    with pytest.raises(
        Refused, match=rf"holds model\.layers\.{layers - 1}\.\S+, .* its config.json has no place"
    ):
        load(checkpoint)
    configure(checkpoint, num_nextn_predict_layers=1)  # they predict the tokens after the next one
    load(checkpoint)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "name",
    [f"{QUERY}.bias", f"{QUERY}.weight_scale_inv", f"{QUERY}.lora_A.default.weight", "model.norm.bias"],
)
def test_weights_of_a_module_that_has_no_such(checkpoint, load, name):
    add(checkpoint, **{name: torch.ones(4)})
    with pytest.raises(Refused, match=name):
        load(checkpoint)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_what_stands_beside_the_model(checkpoint, load):
    names = ("score.weight", "v_head.summary.weight", "model.mtp.0.norm.weight", "model.rotary_emb.inv_freq")
    older = "model.layers.0.self_attn.rotary_emb.inv_freq"
    add(checkpoint, **{name: torch.ones(1, tiny_sizes.SIZES["hidden_size"]) for name in (*names, older)})
    load(checkpoint)
