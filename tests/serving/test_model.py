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

from rlhfctl.errors import Refused
from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import ModelSource, RemoteSource, Template
from rlhfctl.rewards.model import ModelReward
from rlhfctl.rewards.remote import RemoteReward
from rlhfctl.serving.scorers import open_served

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m.role == 'user' %}={% endif %}{{ m.content }}{{ eos_token }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random but for its seed; its template takes no system message."""
    import torch
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
    answer = served.post("/get_reward", json={"query": ["x y"]})
    assert (answer.status_code, answer.json()["error"]["fields"][0]["field"]) == (422, "prompts")
    too_long = served.post("/get_reward", json={"query": ["1+1?" + "1" * 5000], "prompts": ["1+1?"]})
    assert too_long.status_code == 500
    assert "1 of 1 queries have no score" in too_long.json()["error"]["message"]
