"""The two families share neither ids, template nor stop token; a reward model of one scores a policy of the other."""

from pathlib import Path

import pytest
import torch

from rlhfctl.models.tokenizer import load_encoder
from rlhfctl.quickstart.chains import chain
from rlhfctl.quickstart.family import CHATML, PLAIN, make_tokenizer, write_model
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.rewards.model import ModelReward

PROMPT = "3+8*2-9+5"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(reward model of the plain family, model of the ChatML family)."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    out = tmp_path_factory.mktemp("families")
    write_model(out / "rm")
    write_model(out / "b", CHATML)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(out / "rm", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(out / "rm")
    return out / "rm", out / "b"


def test_a_conversation_by_hand(directories: tuple[Path, Path]) -> None:
    encoder = load_encoder(str(directories[1]))
    messages = [{"role": "user", "content": "3+8?"}, {"role": "assistant", "content": "3+8=1\n#1"}]
    text = "<|im_start|>user\n3+8?<|im_end|>\n<|im_start|>assistant\n3+8=1\n#1<|im_end|>\n"
    assert encoder.render(messages) == text
    ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [1, 4, 6, 17, 12, 19, 9, 2, 6, 1, 5, 6, 17, 12, 19, 8, 18, 7, 18, 2, 6]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert encoder.stop_ids == (2,)


def test_no_character_has_one_id_in_both() -> None:
    plain, chatml = make_tokenizer(PLAIN), make_tokenizer(CHATML)
    both = set(PLAIN.vocabulary) & set(CHATML.vocabulary)
    assert set("0123456789+-*=#?\n") == both
    assert [token for token in both if plain.token_to_id(token) == chatml.token_to_id(token)] == []


def test_the_bridge_gives_the_scores_of_the_reward_models_own_pipeline(
    directories: tuple[Path, Path],
) -> None:
    """What the policy sampled are ids of its own vocabulary; decoded, they are scored as if the plain family had
    written them."""
    rm, b = directories
    policy = load_encoder(str(b))
    responses = [chain(PROMPT), "3+8=1\n#1", "#7"]
    sampled = [
        policy.decode_response(policy.tokenizer.encode(r, add_special_tokens=False).ids) for r in responses
    ]
    samples = [{"messages": [{"role": "user", "content": f"{PROMPT}?"}], "response": r} for r in sampled]
    source = ModelReward(ModelSource(kind="model", path=str(rm)), policy)
    scores = [outcome.score for outcome in source.score(samples)]
    own = make_tokenizer(PLAIN)
    for response, score in zip(responses, scores, strict=True):
        ids = own.encode(f"{PROMPT}?{response}<eos>", add_special_tokens=False).ids
        assert score == pytest.approx(source.model.score([ids], 64)[0], abs=1e-6)
    assert len(set(scores)) == 3


def test_a_role_name_in_an_answer_is_a_failure_and_no_score(directories: tuple[Path, Path]) -> None:
    """The ChatML vocabulary can write `user`; the plain one has no such characters."""
    source = ModelReward(ModelSource(kind="model", path=str(directories[0])))
    (outcome,) = source.score([{"messages": [{"role": "user", "content": "3?"}], "response": "3user#3"}])
    assert (outcome.status, outcome.score) == ("error", None)
