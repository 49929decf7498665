"""A reward model behind the service gives the scores that it gives in the trainer's own process."""

import concurrent.futures
import hashlib
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
import torch
from fake_reward_server import Fake

from rlhfctl.errors import Refused
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import ModelSource, RemoteSource, Template
from rlhfctl.rewards.model import ModelReward
from rlhfctl.rewards.remote import RemoteReward
from rlhfctl.serving.app import reward
from rlhfctl.serving.scorers import open_served, weight_facts

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}={% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
)
AUTO = "bfloat16" if torch.cuda.is_available() else "float32"  # what a model of dtype auto is in here


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random but for its seed; its template takes no system message."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    directory = tmp_path_factory.mktemp("reward-model")
    write_model(directory)
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(directory, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(NO_SYSTEM)
    return directory


@pytest.fixture(scope="module")
def served(start: Callable[..., Any], reward_model: Path) -> Any:
    return start(reward_model)


@pytest.fixture(scope="module")
def here(reward_model: Path) -> ModelReward:
    return ModelReward(ModelSource(kind="model", path=str(reward_model)))


def question(n: int, **more: Any) -> dict[str, Any]:
    messages = [*more.pop("before", []), {"role": "user", "content": f"{n % 10}+{n // 10 % 10}?"}]
    row = {"id": f"q{n}", "messages": messages, "response": f"{n}=1\n#{n % 10}" * (n % 3 + 1), "label": None}
    return {**row, "metadata": {}, **more}


def test_scores_are_those_of_the_model_in_this_process(served: Any, here: ModelReward) -> None:
    rows = [question(n) for n in range(40)]
    wanted = [outcome.score for outcome in here.score(rows)]
    assert len({round(score or 0, 4) for score in wanted}) > 20
    remote = RemoteReward(RemoteSource(kind="remote", url=served.url, request_size=7, max_in_flight=4))
    assert [outcome.score for outcome in remote.score(rows)] == pytest.approx(wanted, abs=1e-5)
    remote.close()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:  # 40 clients of one sample each
        alone = list(pool.map(lambda row: served.ask(row).json()["rewards"][0]["score"], rows))
    assert alone == pytest.approx(wanted, abs=1e-5)


def test_a_model_of_the_hub_is_served_under_its_id(
    reward_model: Path, here: ModelReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache of the hub, as a download leaves it."""
    cached = tmp_path / "cache/models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    shutil.copytree(reward_model, cached / "snapshots/abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    served = open_served("some/model")
    assert served.info.name == "some/model"
    rows = [question(n) for n in range(4)]
    found, wanted = served.scorers[0].score([rows])[0], here.score(rows)
    assert [each.score for each in found] == pytest.approx([each.score for each in wanted], abs=1e-6)


def test_the_hash_is_that_of_the_rendered_text(served: Any, here: ModelReward) -> None:
    row = question(5)
    text = here.bridge.render(row["messages"], row["response"])
    found = served.ask(row).json()["rewards"][0]["text_sha256"]
    assert found == hashlib.sha256(text.encode()).hexdigest()


def test_handshake(served: Any, reward_model: Path) -> None:
    info = httpx.get(f"{served.url}/v1/info").json()
    assert info["kind"] == "model"
    assert info["template"]["text"] == NO_SYSTEM
    assert info["template"]["sha256"] == hashlib.sha256(NO_SYSTEM.encode()).hexdigest()
    assert len(info["tokenizer_sha256"]) == len(info["fingerprint"]) == 64
    hidden = json.loads((reward_model / "config.json").read_text())["hidden_size"]
    assert info["head"] == {"status": "loaded", "shape": [1, hidden]}
    assert (info["mean"], info["std"]) == (0.0, 1.0)
    assert info["granularities"] == ["sequence"]


def test_the_fingerprint_follows_what_decides_a_score(reward_model: Path, tmp_path: Path) -> None:
    """And not the place of the files."""
    copies = {
        name: shutil.copytree(reward_model, tmp_path / name) for name in ("here", "there/again", "token")
    }
    settings = json.loads((copies["token"] / "tokenizer_config.json").read_text())
    settings["bos_token"] = settings["eos_token"]
    (copies["token"] / "tokenizer_config.json").write_text(json.dumps(settings))
    found = {name: open_served(str(path)).info for name, path in copies.items()}
    assert found["here"].fingerprint == found["there/again"].fingerprint
    assert found["here"].template is not None
    assert found["token"].template is not None
    assert found["here"].template.sha256 == found["token"].template.sha256
    assert found["here"].tokenizer_sha256 == found["token"].tokenizer_sha256
    assert found["here"].fingerprint != found["token"].fingerprint
    same = open_served(str(copies["here"]), dtype=AUTO).info.fingerprint
    other = open_served(str(copies["here"]), dtype="bfloat16" if AUTO == "float32" else "float32")
    assert same == found["here"].fingerprint != other.info.fingerprint


def test_an_adapter_is_the_same_wherever_its_base_lies(tmp_path: Path) -> None:
    found = []
    for name, settings in (("a", {}), ("b", {}), ("c", {"lora_alpha": 9})):
        base, adapter = tmp_path / name / f"base-{name}", tmp_path / name / "adapter"
        base.mkdir(parents=True)
        adapter.mkdir()
        (base / "config.json").write_text("{}")
        written = {"base_model_name_or_path": str(base), "lora_alpha": 8, **settings}
        (adapter / "adapter_config.json").write_text(json.dumps(written))
        found.append(weight_facts(adapter))
    assert found[0] == found[1] != found[2]
    for settings in ({"quantization": "nf4", "quantization_block": 64}, {"quantization": "int8"}):
        facts = {"path": "gone", "fingerprint": None, **settings}
        (tmp_path / "a/adapter/adapter_base.json").write_text(json.dumps(facts))
        found.append(weight_facts(tmp_path / "a/adapter"))
    assert len({json.dumps(each) for each in found}) == 4


def test_a_granularity_that_the_model_cannot_give(served: Any) -> None:
    answer = served.ask(question(1), granularity="token")
    assert answer.status_code == 422
    assert answer.json()["error"]["fields"] == [
        {"field": "granularity", "problem": answer.json()["error"]["message"].removeprefix("granularity: ")}
    ]
    assert "it gives sequence" in answer.json()["error"]["message"]


def test_what_the_template_refuses_is_an_error_of_that_sample(served: Any) -> None:
    system = [{"role": "system", "content": "0*0=0"}]
    strange = question(3, messages=[{"role": "user", "content": [{"type": "image"}]}])
    rewards = served.ask(question(1), question(2, before=system), strange).json()["rewards"]
    assert [each["status"] for each in rewards][:2] == ["ok", "error"]
    assert "no system role" in rewards[1]["error"]
    assert rewards[1]["score"] is None


def test_the_recipe_may_have_the_system_message_folded_before_it_leaves(
    served: Any, reward_model: Path
) -> None:
    template = Template(fold_system=True, merge_roles=True)
    rows = [question(n, before=[{"role": "system", "content": "0*0=0"}]) for n in range(4)]
    here = ModelReward(ModelSource(kind="model", path=str(reward_model)), None, template)
    remote = RemoteReward(RemoteSource(kind="remote", url=served.url), None, template)
    outcomes = remote.score(rows)
    remote.close()
    assert [each.score for each in outcomes] == pytest.approx(
        [each.score for each in here.score(rows)], abs=1e-5
    )
    refused = RemoteReward(RemoteSource(kind="remote", url=served.url))
    assert [each.status for each in refused.score(rows)] == ["error"] * 4
    refused.close()


def test_the_trainer_refuses_another_template_or_fingerprint(served: Any) -> None:
    for key in ("template_sha256", "fingerprint"):
        with pytest.raises(Refused, match=key):
            RemoteReward(RemoteSource.model_validate({"kind": "remote", "url": served.url, key: "0" * 64}))


def test_a_server_of_another_template_than_it_tells_is_refused(reward_model: Path, tmp_path: Path) -> None:
    """The text that was scored is rendered here too: what the handshake says is held against it."""
    rows = [question(n) for n in range(3)]
    other = shutil.copytree(reward_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text(NO_SYSTEM.replace("%}={%", "%}#{%"))
    told, scores = open_served(str(reward_model)).info, open_served(str(other)).scorers[0]

    def answer(fake: Fake, body: dict[str, Any]) -> Any:
        asked = body["samples"]
        outcomes = scores.score([asked])[0]
        found = [reward(each, outcome, "sequence") for each, outcome in zip(asked, outcomes, strict=True)]
        return {"schema": 1, "rewards": found, "model": {"fingerprint": told.fingerprint}}

    server = Fake(answer, told.model_dump(by_alias=True))
    remote = RemoteReward(RemoteSource(kind="remote", url=server.url))
    outcomes = remote.score(rows)
    remote.close()
    server.close()
    assert [(outcome.status, outcome.score) for outcome in outcomes] == [("error", None)] * 3
    assert "scored another text than its own template makes of the sample 'q0'" in str(outcomes[0].error)


def openrlhf_client(url: str, data: dict[str, Any], tries: int = 5, timeout: float = 180.0) -> dict[str, Any]:
    """What a client of OpenRLHF's remote reward does: a JSON post, five tries, and no look at anything but the body."""
    for _ in range(tries):
        request = urllib.request.Request(
            url, json.dumps(data).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return dict(json.load(reply))
        except urllib.error.URLError:
            time.sleep(0.01)
    raise RuntimeError("no answer after five tries")


def test_a_client_of_openrlhf(served: Any, here: ModelReward) -> None:
    rows = [question(n) for n in range(6)]
    prompts = [row["messages"][0]["content"] for row in rows]
    queries = [f"<s>{prompt}{row['response']}</s>" for prompt, row in zip(prompts, rows, strict=True)]
    answer = openrlhf_client(
        f"{served.url}/get_reward", {"query": queries, "prompts": prompts, "labels": ["1"] * 6}
    )
    wanted = [outcome.score for outcome in here.score(rows)]
    assert answer["rewards"] == answer["scores"] == pytest.approx(wanted, abs=1e-5)
    assert answer["extra_logs"] == {}


def test_a_client_of_openrlhf_gets_an_error_and_never_a_zero(served: Any) -> None:
    url = f"{served.url}/get_reward"
    with pytest.raises(RuntimeError):
        openrlhf_client(url, {"query": ["<|im_start|>user\nx y"], "prompts": ["<|im_start|>user\nx "]})
    answer = served.post(
        "/get_reward", json={"query": ["<|im_start|>user\nx y"], "prompts": ["<|im_start|>user\nx "]}
    )
    assert "rendered through a chat template already" in answer.json()["error"]["message"]
    for rendered in ("[INST] hi [/INST]", "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"):
        answer = served.post("/get_reward", json={"query": [f"{rendered}y"], "prompts": [rendered]})
        assert answer.status_code == 422
        assert answer.json()["error"]["fields"][0]["field"] == "prompts.0"
        assert "rendered through a chat template already" in answer.json()["error"]["message"]
    answer = served.post("/get_reward", json={"query": ["x y"]})
    assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "prompts")
    too_long = served.post("/get_reward", json={"query": ["1+1?" + "1" * 5000], "prompts": ["1+1?"]})
    assert too_long.status_code == 500
    assert "1 of 1 queries have no score" in too_long.json()["error"]["message"]
