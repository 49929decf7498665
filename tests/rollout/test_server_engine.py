"""The client of rollout servers: what it asks, what it does when one dies, lies or hangs. No vLLM here."""

import copy
import time

import pytest
import torch

from rlhfctl.errors import Refused, RunFailed
from rlhfctl.models.lora import add_lora
from rlhfctl.recipe.rollout_server import RolloutServer
from rlhfctl.recipe.sections import Lora
from rlhfctl.rollout import vllm_server, weight_files
from rlhfctl.rollout.types import EngineLost, Request, Sampling
from rlhfctl.rollout.vllm_server import VllmServerEngine

N = 3


@pytest.fixture
def said():
    return []


@pytest.fixture
def make_engine(policy, servers, said):
    """make_engine(**keys of rollout.server): an engine over both servers, not synced yet."""
    made = []

    def make(**keys):
        spec = RolloutServer(**({"urls": [server.url for server in servers]} | keys))
        made.append(VllmServerEngine(spec, policy, 64, 2048, False, None, said.append))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def sampling(step=2, temperature=0.7):
    return Sampling(8, temperature, 1.0, (3,), 5, step, 0)


def requests(prompts=6):
    return [Request(place * N + k, [9, 10 + place]) for place in range(prompts) for k in range(N)]


def ids(rollouts):
    return [(rollout.index, rollout.response_ids, rollout.logprobs.tolist()) for rollout in rollouts]


def groups_asked(server):
    return [
        body
        for path, body in server.asked
        if path == "/inference/v1/generate" and "n" in body["sampling_params"]
    ]


def test_a_prompt_is_one_request_and_a_sample_depends_on_seed_step_and_index(make_engine, policy, servers):
    engine = make_engine()
    assert engine.sync(policy, 0) == {"sync/canary": 0.0, "sync/servers": 2.0}
    whole = engine.generate(requests(), sampling())
    assert [rollout.index for rollout in whole] == list(range(6 * N))
    asked = groups_asked(servers[0]) + groups_asked(servers[1])
    assert sorted(body["token_ids"][1] for body in asked) == [10, 11, 12, 13, 14, 15]
    assert all(groups_asked(server) for server in servers)
    assert {body["sampling_params"]["n"] for body in asked} == {N}
    assert {body["cache_salt"] for body in asked} == {engine.version}
    part = requests()[::-4]
    assert ids(engine.generate(part, sampling())) == [ids(whole)[request.index] for request in part]
    assert len({tuple(rollout.response_ids) for rollout in whole[:N]}) == N
    assert ids(engine.generate(requests(), sampling(step=3))) != ids(whole)
    engine.generate(requests(1), sampling(temperature=0.0))
    assert [body["sampling_params"]["n"] for server in servers for body in groups_asked(server)].count(1) >= N
    with pytest.raises(RunFailed, match="60 tokens and 8 new ones pass the engine's 64"):
        engine.generate([Request(0, [9] * 60)], sampling())
    engine.generate([Request(0, [9] * 60, 4), Request(1, [9] * 60, 3)], sampling())
    last = [body for server in servers for body in groups_asked(server) if len(body["token_ids"]) == 60]
    assert sorted(body["sampling_params"]["max_tokens"] for body in last) == [3, 4]


FAULTS = {
    "dies": lambda server: {"raise": True},
    "error": lambda server: {"status": 500},
    "short": lambda server: {"choices": []},
    "other weights": lambda server: setattr(server, "version", "default") or {},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_group_is_asked_again_of_another_server(make_engine, policy, servers, said, fault):
    engine = make_engine()
    engine.sync(policy, 0)
    whole = ids(engine.generate(requests(), sampling()))
    begun = len(servers[0].asked)

    def broken(path, body, number):
        if number <= begun + 1:
            return {}  # one answer yet: it goes in the middle of the rollout
        changed = FAULTS[fault](servers[0])
        if changed.pop("raise", False):
            raise ConnectionError
        return changed

    servers[0].fault = broken
    assert ids(engine.generate(requests(), sampling())) == whole
    assert len(said) == 1
    assert f"step 3: a rollout server is lost: {servers[0].url}" in said[0]
    assert said[0].endswith("; 1 left")
    silent = len(servers[0].asked)
    assert ids(engine.generate(requests(), sampling())) == whole
    assert len(servers[0].asked) == silent  # not asked again

    servers[0].fault = lambda path, body, number: {}
    assert engine.sync(policy, 3)["sync/servers"] == 2.0
    assert said[1] == f"step 3: the rollout server {servers[0].url} is back"
    assert ids(engine.generate(requests(), sampling())) == whole


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"token_ids": [4, 4]}, "log-probabilities of other tokens"),
        ({"finish_reason": "abort"}, "ended sample 0 with abort"),
        (
            {"logprobs": {"content": [{"token_id": 7, "logprob": -9999.0}]}, "token_ids": [7]},
            "are not finite",
        ),
        ({"logprobs": None}, "no usable samples"),
        ({"weight_versions": [{"version": "other.7"}]}, r"other weights than this run gave it \(other\.7\)"),
    ],
)
def test_an_answer_that_is_wrong_is_not_trained_on(make_engine, policy, servers, answer, why):
    engine = make_engine(urls=[servers[0].url])
    engine.sync(policy, 0)

    def lying(path, body, number):
        return {"choices": [servers[0].choice(body["token_ids"], body["sampling_params"], 0) | answer]}

    servers[0].fault = lying
    with pytest.raises(EngineLost, match=rf"step 3: no rollout server is left \(.*{why}"):
        engine.generate([Request(0, [9, 10])], sampling())


def test_with_the_last_server_the_rollout_ends_in_bounded_time(make_engine, policy, servers):
    engine = make_engine(request_timeout=0.3)
    engine.sync(policy, 0)
    servers[1].close()
    servers[0].fault = lambda path, body, number: time.sleep(1.5) or {}
    began = time.monotonic()
    with pytest.raises(EngineLost) as lost:
        engine.generate(requests(), sampling())
    assert time.monotonic() - began < 5
    for server in servers:
        assert server.url in lost.value.message
    assert "did not answer within 0 s" in lost.value.message
    with pytest.raises(EngineLost, match="stopped in an evaluation: no rollout server is left"):
        engine.generate(requests(), sampling(temperature=0.0))


def test_a_request_that_is_wrong_everywhere_ends_the_run_at_once(make_engine, policy, servers, said):
    engine = make_engine()
    engine.sync(policy, 0)
    for server in servers:
        server.fault = lambda path, body, number: {"status": 400}
    with pytest.raises(RunFailed, match="HTTP 400: asked for by a test"):
        engine.generate(requests(), sampling())
    assert not said


def test_a_sync_that_takes_too_long_ends_in_bounded_time(make_engine, policy, servers, said):
    engine = make_engine(sync_timeout=1.0)
    servers[0].fault = lambda path, body, number: (path == "/collective_rpc" and time.sleep(2.5)) or {}
    began = time.monotonic()
    assert engine.sync(policy, 4)["sync/servers"] == 1.0  # the other one has the weights
    assert f"step 4: a rollout server is lost: {servers[0].url} did not answer within 1 s" in said[0]
    servers[1].fault = servers[0].fault
    with pytest.raises(
        RunFailed, match=r"step 5: the weight sync took longer than rollout.server.sync_timeout \(1 s\)"
    ):
        engine.sync(policy, 5)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("broken", ["layer", "stale", "merge"])
def test_a_broken_sync_stops_the_run_at_the_first_sync(make_engine, policy, monkeypatch, broken):
    engine = make_engine()
    whole = vllm_server.merged_weights
    if broken == "layer":
        kept = lambda p: ((n, w) for n, w in whole(p) if ".layers.1." not in n)  # noqa: E731
        monkeypatch.setattr(vllm_server, "merged_weights", kept)
    elif broken == "stale":
        old = copy.deepcopy(policy)
        monkeypatch.setattr(vllm_server, "merged_weights", lambda _: whole(old))
    else:
        from peft.tuners.lora import Linear

        add_lora(policy, Lora(rank=4, alpha=64.0), 1)
        right = Linear.get_delta_weight
        monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: 2 * right(layer, name))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(RunFailed, match=r"step 0: after the weight sync .* difference of .* 0\.0001 allowed"):
        engine.sync(policy, 0)
    monkeypatch.undo()
    assert engine.sync(policy, 0)["sync/canary"] < 1e-5


def test_files_that_are_not_whole_are_not_loaded(make_engine, policy, servers, tmp_path, monkeypatch):
    engine = make_engine(urls=[servers[0].url], sync_dir=str(tmp_path))
    write = weight_files.write
    monkeypatch.setattr(weight_files, "write", lambda weights, at: write(weights, at, 4096) + 1)
    servers[0].sync_files = lambda directory, tensors: {
        "error": f"ValueError: 21 tensors, {tensors} were written"
    }
    with pytest.raises(
        RunFailed, match=r"the weight sync failed: .* ValueError: 21 tensors, 22 were written"
    ):
        engine.sync(policy, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vocabulary": 62}, "runs a model of 62 token ids, the policy has 61"),
        ({"dtype": "bfloat16"}, "computes in bfloat16, the policy in float32: start it with --dtype float32"),
        ({"logprobs_mode": "raw_logprobs"}, "gives raw_logprobs"),
        ({"chunked_prefill": True}, "prefills prompts in parts"),
        ({"length": 63}, "takes 63 tokens of prompt and response, this run needs 64"),
    ],
)
def test_a_server_of_another_model_is_refused(make_engine, servers, changes, why):
    servers[1].length = changes.pop("length", 128)
    servers[1].info |= changes
    with pytest.raises(Refused, match=why) as refused:
        make_engine()
    assert servers[1].url in refused.value.message


def test_a_server_that_is_not_there_is_refused(make_engine, servers):
    servers[1].close()
    with pytest.raises(Refused, match=f"{servers[1].url} does not answer: .*rollout.server.urls"):
        make_engine()
