"""Value models on disk: what is written is what is read, and V stands at the token it is asked for."""

import json

import pytest
import tiny_sizes
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from rlhfctl.errors import Refused
from rlhfctl.evaluation.guided import value_of
from rlhfctl.models.load import backbone, load_causal_lm
from rlhfctl.models.value import load_critic
from rlhfctl.models.value_model import (
    TokenSumHead,
    ValueFunction,
    load_value_model,
    refuse_other_vocabulary,
    save_value_model,
)
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import Policy, ValueModel
from rlhfctl.search.beam import Candidate

CPU = torch.device("cpu")
SIZES = tiny_sizes.SIZES | {"vocab_size": 53, "max_position_embeddings": 64}
ROWS = [[3, 9, 4, 7, 2], [5, 8, 1], [6, 6, 6, 6, 6, 6, 6, 11]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("policy")
    write_model(directory)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    return Policy(path=str(directory))


@pytest.fixture
def scalar(policy, tmp_path):
    """(directory, head) of a value model with a random scalar head."""
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    trunk = backbone(load_causal_lm(policy, CPU, 0))
    save_value_model(tmp_path / "v", trunk, head, policy, {"seen": 3})
    return tmp_path / "v", head


def hidden(policy, row):
    """By transformers, one row at a time."""
    with torch.no_grad():
        return LlamaModel.from_pretrained(policy.path).eval()(torch.tensor([row])).last_hidden_state[0]


def load(directory):
    return load_value_model(directory, torch.float32, CPU)


def test_a_scalar_value_is_the_head_at_the_token_itself(policy, scalar):
    directory, head = scalar
    model = load(directory)
    assert (model.kind, model.facts["seen"], model.vocabulary) == ("scalar", 3, 53)
    places = [[0, 2, 4], [], [7]]
    found = model.at(ROWS, places, 10)
    for row, read, values in zip(ROWS, places, found, strict=True):
        expected = (hidden(policy, row)[read] @ head.t()).squeeze(-1)
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-5)
    together = model.at(ROWS, places, 10_000)
    for alone, packed in zip(found, together, strict=True):
        assert packed == pytest.approx(alone, abs=1e-5)


def test_a_token_sum_reads_the_state_before_each_token(policy, tmp_path):
    head = TokenSumHead(53, 32)
    generator = torch.Generator().manual_seed(2)
    head.prompt.data.normal_(generator=generator)
    head.token.data.normal_(generator=generator)
    save_value_model(tmp_path / "v", backbone(load_causal_lm(policy, CPU, 0)), head, policy)
    model = load(tmp_path / "v")
    assert model.kind == "token_sum"
    prompts, places = [2, 1, 3], [[1, 3, 4], [2], [2, 7]]
    found = model.at(ROWS, places, 10, prompts)
    for row, prompt, read, values in zip(ROWS, prompts, places, found, strict=True):
        states = hidden(policy, row)
        for place, value in zip(read, values, strict=True):
            expected = states[prompt - 1] @ head.prompt[0]
            for token in range(prompt, place + 1):
                expected = expected + states[token - 1] @ head.token[row[token]]
            assert value == pytest.approx(expected.item(), abs=1e-4)
    with pytest.raises(ValueError, match="number of prompt tokens"):
        model.at(ROWS, places, 10)
    with pytest.raises(ValueError, match="inside the prompt"):
        model.at(ROWS, [[0], [2], [2]], 10, prompts)


@pytest.mark.parametrize("kind", ["scalar", "token_sum"])
def test_an_empty_answer_has_the_value_of_its_prompt(policy, kind):
    """The policy wrote its stop token at once: the state is the prompt, alone in a pack and beside longer ones."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(1, 32, generator=generator)
    head = weight
    if kind == "token_sum":
        head = TokenSumHead(53, 32)
        head.prompt.data, head.token.data = weight, torch.randn(53, 32, generator=generator)
    model = ValueFunction(backbone(load_causal_lm(policy, CPU, 0)), head, {})
    stop = 2
    empty, short = (
        Candidate(0, ids, -1.0, finish="stop", depth=0, parent=None, step=0) for ids in ([stop], [7, stop])
    )
    value = value_of(model, [[4, 5, 9]], (stop,))
    expected = float(hidden(policy, [4, 5, 9])[-1] @ weight[0])
    assert value([empty]) == pytest.approx([expected], abs=1e-5)
    assert value([short, empty])[1] == pytest.approx(expected, abs=1e-5)


def test_it_starts_another_value_model(policy, scalar):
    directory, head = scalar
    model = load_causal_lm(policy, CPU, 0)
    critic = load_critic(ValueModel(init=str(directory)), policy, model, CPU, 0, None)
    assert torch.equal(critic.head.weight, head)


@pytest.mark.parametrize(
    ("head", "link"), [("scalar", "logistic"), ("token_sum", None), ("token_sum", "logistic")]
)
def test_a_value_that_was_fitted_for_search_starts_no_other(policy, tmp_path, head, link):
    """Its sum over tokens would be left out in silence, its logit be taken for a reward."""
    model = load_causal_lm(policy, CPU, 0)
    given = torch.ones(1, 32) if head == "scalar" else TokenSumHead(53, 32)
    save_value_model(tmp_path / "v", backbone(model), given, policy, {} if link is None else {"link": link})
    with pytest.raises(Refused, match=r"fitted for search, .*value_model.head to zero"):
        load_critic(ValueModel(init=str(tmp_path / "v")), policy, model, CPU, 0, None)
    critic = load_critic(ValueModel(init=str(tmp_path / "v"), head="zero"), policy, model, CPU, 0, None)
    assert not critic.head.weight.any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c, t: c.pop("value_model"),
            "not a value model: its config.json says nothing of a value head",
        ),
        (lambda c, t: c.update(value_model={"head": "vector"}), "says nothing of a value head"),
        (lambda c, t: t.clear(), "lacks value_head.safetensors"),
        (lambda c, t: t.update({"score.weight": torch.zeros(1, 7)}), "7 wide, the model 32"),
        (lambda c, t: t["score.weight"].fill_(float("nan")), "NaN"),
        (lambda c, t: c.update(value_model={"head": "token_sum"}), "lacks prompt.weight"),
    ],
)
def test_what_is_not_a_whole_value_model_is_refused(scalar, change, said):
    directory, _ = scalar
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "value_head.safetensors")
    change(config, tensors)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "value_head.safetensors")
    with pytest.raises(Refused, match=said):
        load(directory)


def test_another_vocabulary_is_refused(policy, scalar, tmp_path):
    directory, _ = scalar
    refuse_other_vocabulary(directory, policy.path)
    file = directory / "tokenizer.json"
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(written))
    with pytest.raises(Refused, match=r"has another vocabulary than .* first difference '1'"):
        refuse_other_vocabulary(directory, policy.path)
