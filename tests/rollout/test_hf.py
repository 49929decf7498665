"""Generation against the model scored as a whole, and its independence from batching."""

import copy

import pytest
import tiny_sizes
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from rlhfctl.models import attention
from rlhfctl.models.load import prepare
from rlhfctl.rollout.hf import generate
from rlhfctl.rollout.types import Request, Sampling

SIZES = tiny_sizes.SIZES | {"vocab_size": 61}
STOP = (7, 8)


WINDOW = 6  # fewer tokens than most prompts have, and all responses
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "window-of-some-layers": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def models(request):
    attention.register()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(request.param), attn_implementation="eager")
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(request.param), attn_implementation=attention.NAME)
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():  # spread the distribution, so that samples differ
        ours.get_output_embeddings().weight.mul_(8)
        plain.get_output_embeddings().weight.copy_(ours.get_output_embeddings().weight)
    return prepare(ours, torch.device("cpu")), plain.eval()


def requests():
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(9, 61, (length,), generator=generator).tolist() for length in (3, 9, 5, 9)]
    return [Request(place * 3 + k, prompts[place]) for place in range(4) for k in range(3)]


def sampling(**changes):
    values = {
        "max_new_tokens": 24,
        "temperature": 0.9,
        "top_p": 1.0,
        "stop_ids": STOP,
        "seed": 5,
        "step": 2,
        "max_batch_tokens": 100000,
    }
    return Sampling(**(values | changes))


def test_logprobs_are_those_of_the_whole_sequence(models):
    ours, plain = models
    rollouts = generate(ours, requests(), sampling())
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        start = len(rollout.prompt_ids)
        with torch.no_grad():
            logprobs = (plain(ids).logits[0, start - 1 : -1] / 0.9).log_softmax(-1)
        expected = logprobs.gather(1, ids[0, start:, None]).squeeze(1)
        torch.testing.assert_close(rollout.logprobs, expected, atol=2e-5, rtol=0)


def test_responses_end_at_the_first_stop_token_or_at_the_limit(models):
    for rollout in generate(models[0], requests(), sampling()):
        inside = [token for token in rollout.response_ids[:-1] if token in STOP]
        assert not inside
        assert (rollout.finish == "stop") == (rollout.response_ids[-1] in STOP)
        assert rollout.finish == "stop" or len(rollout.response_ids) == 24


@pytest.mark.parametrize("budget", [1, 120, 400])
def test_a_sample_does_not_depend_on_its_batch(models, budget):
    whole = generate(models[0], requests(), sampling())
    parts = generate(models[0], list(reversed(requests())), sampling(max_batch_tokens=budget))
    by_index = {rollout.index: rollout for rollout in parts}
    for rollout in whole:
        assert by_index[rollout.index].response_ids == rollout.response_ids


def test_greedy_equals_transformers_generate(models):
    ours, plain = models
    for request, rollout in zip(
        requests()[::3], generate(ours, requests()[::3], sampling(temperature=0.0)), strict=True
    ):
        with torch.no_grad():
            out = plain.generate(
                torch.tensor([request.prompt_ids]),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=list(STOP),
                pad_token_id=0,
            )
        assert rollout.response_ids == out[0, len(request.prompt_ids) :].tolist()


def test_samples_of_one_prompt_differ_and_steps_differ(models):
    first = generate(models[0], requests(), sampling())
    assert len({tuple(rollout.response_ids) for rollout in first[:3]}) > 1
    second = generate(models[0], requests(), sampling(step=3))
    assert [r.response_ids for r in first] != [r.response_ids for r in second]
