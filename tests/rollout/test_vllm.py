"""vLLM itself beside a trainer's module: equal after every sync, and stopped at the first wrong one."""

import copy

import pytest
import torch

from rlhfctl.errors import RunFailed
from rlhfctl.models import attention
from rlhfctl.rollout.types import Request, Sampling

pytestmark = pytest.mark.heavy
STOP = (7, 8)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def make_policy(tied, dtype=torch.float32, lora=False):
    from transformers import AutoModelForCausalLM, Qwen2Config

    from rlhfctl.models.load import prepare
    from rlhfctl.models.lora import add_lora
    from rlhfctl.recipe.sections import Lora

    attention.register()
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():  # spread the distribution, so that samples differ
        model.get_input_embeddings().weight.mul_(4)
        if not tied:
            model.get_output_embeddings().weight.mul_(8)
    policy = prepare(model.to(dtype), torch.device("cpu"))
    if lora:
        add_lora(policy, Lora(rank=4, alpha=8.0), 1)
    return policy


def train(policy, seed):
    """Stands for a phase of optimizer steps: every trained weight moves a little."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def make_engine(policy):
    from rlhfctl.rollout.vllm import VllmEngine

    return VllmEngine(policy, max_length=256, cache_tokens=2048, trust_remote_code=False)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request):
    policy = make_policy(request.param)
    engine = make_engine(policy)
    yield policy, engine
    engine.close()


def sampling(**changes):
    values = {
        "max_new_tokens": 24,
        "temperature": 0.7,
        "top_p": 1.0,
        "stop_ids": STOP,
        "seed": 5,
        "step": 2,
        "max_batch_tokens": 0,
    }
    return Sampling(**(values | changes))


def requests():
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(9, 61, (length,), generator=generator).tolist() for length in (3, 9, 200)]
    return [Request(place * 4 + k, prompts[place]) for place in range(3) for k in range(4)]


def plain_logits(policy, ids):
    """[T, V] by transformers' own attention, not ours."""
    policy.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            return policy(torch.tensor([ids]), use_cache=False).logits[0].float()
    finally:
        policy.config._attn_implementation = attention.NAME


def gap(policy, rollouts, temperature):
    """Largest difference between the sampler's log-probabilities and the model's own forward."""
    worst = 0.0
    for rollout in rollouts:
        ids, start = rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids)
        rows = (plain_logits(policy, ids) / temperature).log_softmax(-1)
        wanted = rows[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]
        worst = max(worst, float((wanted - rollout.logprobs).abs().max()))
    return worst


def test_samples_are_the_trainers_after_every_sync(pair):
    """The 200-token prompts fill blocks of the prefix cache: stale ones would show in the second round."""
    policy, engine = pair
    for step in range(3):
        train(policy, step)
        assert 0 < engine.sync(policy, step)["sync/canary"] < 2e-5
        rollouts = engine.generate(requests(), sampling())
        assert gap(policy, rollouts, 0.7) < 2e-5
        assert gap(policy, engine.generate(requests(), sampling(temperature=0.0)), 1.0) < 2e-5
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert (rollout.response_ids[-1] in STOP) == (rollout.finish == "stop")
        assert not set(rollout.response_ids[:-1]) & set(STOP)


def test_a_sample_depends_on_seed_step_and_index_alone(pair):
    policy, engine = pair
    engine.sync(policy, 0)
    whole = engine.generate(requests(), sampling())
    part = engine.generate(requests()[::-3], sampling())
    assert [r.response_ids for r in part] == [r.response_ids for r in whole[::-3]]
    assert len({tuple(r.response_ids) for r in whole[:4]}) > 1
    other = engine.generate(requests(), sampling(step=3))
    assert [r.response_ids for r in other] != [r.response_ids for r in whole]


def test_more_prompt_tokens_than_one_pass_takes(pair):
    """Past 4,096 tokens vLLM would prefill a prompt in parts, which seeded requests on a CPU do not survive."""
    policy, engine = pair
    engine.sync(policy, 0)
    generator = torch.Generator().manual_seed(4)
    many = [Request(k, torch.randint(9, 61, (190,), generator=generator).tolist()) for k in range(30)]
    rollouts = engine.generate(many, sampling(max_new_tokens=4))
    assert [rollout.index for rollout in rollouts] == list(range(30))
    assert gap(policy, rollouts, 0.7) < 2e-5


def test_too_long_a_prompt_is_refused(pair):
    with pytest.raises(RunFailed, match=r"250 tokens and 24 new ones pass the engine's 256"):
        pair[1].generate([Request(0, [9] * 250)], sampling())


def test_a_request_may_ask_for_less(pair):
    """The samples of one are those of the other, as far as they go."""
    policy, engine = pair
    engine.sync(policy, 0)
    prompts = [[9] * 250, [9] * 12]
    (short, long) = engine.generate([Request(k, ids, 6 - 2 * k) for k, ids in enumerate(prompts)], sampling())
    assert (len(short.response_ids) <= 6, len(long.response_ids) <= 4) == (True, True)
    (whole,) = engine.generate([Request(1, prompts[1])], sampling())
    assert whole.response_ids[: len(long.response_ids)] == long.response_ids


@pytest.mark.parametrize("broken", ["layer", "stale", "head"])
def test_a_broken_sync_stops_the_run(pair, broken, monkeypatch):
    from rlhfctl.rollout import vllm

    policy, engine = pair
    engine.sync(policy, 0)
    if broken == "head" and not engine.tied:
        pytest.skip("only a tied head is packed apart from its weight")
    whole = vllm.merged_weights
    if broken == "layer":
        monkeypatch.setattr(
            vllm, "merged_weights", lambda p: ((n, w) for n, w in whole(p) if ".layers.1." not in n)
        )
    elif broken == "stale":
        old = copy.deepcopy(policy)
        monkeypatch.setattr(vllm, "merged_weights", lambda _: whole(old))
    else:
        monkeypatch.setattr(vllm, "pack_head", lambda _: None)
    train(policy, 11)
    with pytest.raises(RunFailed, match=r"step 1: after the weight sync .* difference of .* 0\.0001 allowed"):
        engine.sync(policy, 1)
    monkeypatch.undo()
    assert engine.sync(policy, 1)["sync/canary"] < 2e-5  # nothing of the broken one is left


def test_adapters_arrive_merged_and_a_wrong_merge_is_caught(monkeypatch):
    from peft.tuners.lora import Linear

    policy = make_policy(False, lora=True)
    engine = make_engine(policy)
    try:
        engine.sync(policy, 0)
        train(policy, 4)
        assert engine.sync(policy, 1)["sync/canary"] < 2e-5
        assert gap(policy, engine.generate(requests(), sampling()), 0.7) < 2e-5
        right = Linear.get_delta_weight
        monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: 2 * right(layer, name))
        with pytest.raises(RunFailed, match="after the weight sync"):
            engine.sync(policy, 2)
    finally:
        engine.close()


def test_bfloat16_stays_within_its_tolerance():
    policy = make_policy(False, torch.bfloat16)
    engine = make_engine(policy)
    try:
        found = engine.sync(policy, 0)["sync/canary"]
        print(f"bfloat16 canary {found:.4f}")
        assert found < 0.1
    finally:
        engine.close()
