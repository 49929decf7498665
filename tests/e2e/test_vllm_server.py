"""The real `vllm serve`: started once, synced by files and by broadcast, broken on purpose, used by a run, killed."""

import copy
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from rlhfctl.errors import RunFailed
from rlhfctl.models import attention
from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.rollout.types import EngineLost, Request, Sampling

pytestmark = pytest.mark.heavy
RECIPE = """\
task: ppo
name: served
policy: {from_config: model, tokenizer: model}
reward: {sources: [{kind: verifier, name: chain_answer}, {kind: python, path: reward.py}]}
rollout: {engine: vllm_server, n: 4, max_new_tokens: 16, temperature: 0.8}
algorithm: {advantage: rloo, kl_coef: 0.01, importance_correction: tis}
data: {train: [{path: prompts.jsonl, format: qa}], max_length: 48}
optim: {lr: 1.0e-3, schedule: constant, warmup_ratio: 0.0}
train: {steps: 3, batch_size: 16, tokens_per_microbatch: 2048, log_every: 1}
"""
REWARD = "def score(samples, **_):\n    return [len(str(sample)) % 7 / 7 for sample in samples]\n"


@pytest.fixture(scope="module")
def task(chains, tmp_path_factory):
    """The quickstart's prompts, and a model of its vocabulary with heads that vLLM has a CPU kernel for and a tied
    head, which the CPU build keeps a packed copy of."""
    import json

    out = tmp_path_factory.mktemp("served")
    (out / "model").mkdir()
    for file in (chains / "model").iterdir():
        (out / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "model" / "config.json").read_text())
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    (out / "model" / "config.json").write_text(json.dumps(config))
    (out / "prompts.jsonl").write_bytes((chains / "data" / "prompts.jsonl").read_bytes())
    (out / "reward.py").write_text(REWARD)
    (out / "r.yaml").write_text(RECIPE)
    return out


def make_policy(task, lora=False):
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhfctl.models.load import prepare
    from rlhfctl.models.lora import add_lora
    from rlhfctl.recipe.sections import Lora

    attention.register()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(task / "model")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():  # spread the distribution, so that samples differ
        model.get_input_embeddings().weight.mul_(2)
    policy = prepare(model, torch.device("cpu"))
    if lora:
        add_lora(policy, Lora(rank=4, alpha=8.0), 1)
    return policy


def make_engine(policy, logs=None, **keys):
    from rlhfctl.rollout.vllm_server import VllmServerEngine

    return VllmServerEngine(RolloutServer(**keys), policy, 64, 1024, False, logs, print)


@pytest.fixture(scope="module")
def pair(task):
    """The policy and an engine that has started its server."""
    policy = make_policy(task)
    engine = make_engine(policy, task)
    yield policy, engine
    engine.close()


def train(policy, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def sampling(**changes):
    values = {
        "max_new_tokens": 16,
        "temperature": 0.7,
        "top_p": 1.0,
        "stop_ids": (3, 7),
        "seed": 5,
        "step": 2,
    }
    return Sampling(**(values | {"max_batch_tokens": 0} | changes))


def requests():
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 17, (length,), generator=generator).tolist() for length in (3, 9, 40)]
    return [Request(place * 4 + k, prompts[place]) for place in range(3) for k in range(4)]


def gap(policy, rollouts, temperature):
    """Largest difference between the sampler's log-probabilities and transformers' own forward."""
    worst = 0.0
    policy.config._attn_implementation = "eager"
    try:
        for rollout in rollouts:
            ids, start = rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids)
            with torch.no_grad():
                logits = policy(torch.tensor([ids]), use_cache=False).logits[0].float()
            rows = (logits / temperature).log_softmax(-1)
            wanted = rows[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]
            worst = max(worst, float((wanted - rollout.logprobs).abs().max()))
    finally:
        policy.config._attn_implementation = attention.NAME
    return worst


def test_samples_are_the_trainers_after_every_sync(pair):
    policy, engine = pair
    for step in range(3):
        train(policy, step)
        found = engine.sync(policy, step)
        assert 0 < found["sync/canary"] < 2e-5
        assert found["sync/servers"] == 1
        rollouts = engine.generate(requests(), sampling())
        assert gap(policy, rollouts, 0.7) < 2e-5
        assert gap(policy, engine.generate(requests(), sampling(temperature=0.0)), 1.0) < 2e-5
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert (rollout.response_ids[-1] in (3, 7)) == (rollout.finish == "stop")
    part = engine.generate(requests()[::-3], sampling())
    assert [r.response_ids for r in part] == [r.response_ids for r in rollouts[::-3]]
    assert max(len({tuple(r.response_ids) for r in rollouts[k : k + 4]}) for k in (0, 4, 8)) > 1


@pytest.mark.parametrize("broken", ["layer", "stale", "merge"])
def test_a_broken_sync_stops_the_run(pair, task, broken, monkeypatch):
    from peft.tuners.lora import Linear

    from rlhfctl.rollout import vllm_server

    policy, engine = pair
    engine.sync(policy, 0)
    whole = vllm_server.merged_weights
    if broken == "layer":
        kept = lambda p: ((n, w) for n, w in whole(p) if ".layers.1." not in n)  # noqa: E731
        monkeypatch.setattr(vllm_server, "merged_weights", kept)
    elif broken == "stale":
        old = copy.deepcopy(policy)
        monkeypatch.setattr(vllm_server, "merged_weights", lambda _: whole(old))
    else:
        policy = make_policy(task, lora=True)
        train(policy, 4)
        assert engine.sync(policy, 1)["sync/canary"] < 2e-5
        right = Linear.get_delta_weight
        monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: 2 * right(layer, name))
    train(policy, 11)
    with pytest.raises(RunFailed, match=r"step 1: after the weight sync .* difference of .* 0\.0001 allowed"):
        engine.sync(policy, 1)
    monkeypatch.undo()
    assert engine.sync(policy, 1)["sync/canary"] < 2e-5  # nothing of the broken one is left


def test_weights_by_broadcast(pair):
    policy, engine = pair
    other = make_engine(policy, urls=[engine.infos[0].url], sync="broadcast", sync_timeout=60)
    try:
        for step in range(2):
            train(policy, 20 + step)
            assert 0 < other.sync(policy, step)["sync/canary"] < 2e-5
        assert gap(policy, other.generate(requests(), sampling()), 0.7) < 2e-5
        with pytest.raises(EngineLost, match="answered from other weights than this run gave it"):
            engine.generate(requests(), sampling())  # whose weights are gone
    finally:
        other.close()


def test_a_run_of_two_processes_with_parameters_in_parts_and_adapters(pair, task, cli, metrics):
    """A given server, two ranks that ask it, ZeRO-3, LoRA: each sync is proven, and the sampler's log-probabilities are
    the trainer's, so the correction has nothing to correct."""
    changes = [
        f"rollout.server.urls=[{pair[1].infos[0].url}]",
        "launch.nproc_per_node=2",
        "deepspeed={zero_stage: 3, persist_below: 0}",
        "policy.lora={rank: 4, target_modules: all-linear}",
    ]
    cli("ppo", "r.yaml", *changes, "-q", "--run-dir", "run", cwd=task)
    found = metrics(task / "run")
    assert [record["step"] for record in found] == [1, 2, 3]
    for record in found:
        assert 0 < record["sync/canary"] < 2e-5
        assert record["kl/rollout"] < 1e-9
        assert record["importance/mean"] == pytest.approx(1.0, abs=1e-4)
    assert len({record["entropy"] for record in found}) == 3


def test_killed_in_a_rollout_and_nothing_is_left_of_it(pair):
    """The last test: the server's engine dies, the one behind the address notices, the run is told in one sentence."""
    policy, engine = pair
    engine.lost.clear()
    engine.sync(policy, 7)
    family = session_of(engine.started[0].process.pid)
    assert len(family) >= 4  # guardian, server, engine, worker
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in family}
    os.kill(next(pid for pid, name in names.items() if name.startswith("VLLM::Engine")), signal.SIGKILL)
    with pytest.raises(EngineLost, match="step 3: no rollout server is left"):
        engine.generate(requests(), sampling())
    engine.close()
    ends = time.monotonic() + 10
    while session_of(family[0]) and time.monotonic() < ends:
        time.sleep(0.1)
    assert session_of(family[0]) == []


def session_of(leader):
    """The living processes of its session, the leader first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return sorted(found)
