"""serve-rm --engine vllm: the scores of the plain engine, and plain words where vLLM cannot give them."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfctl.errors import Refused, Unable, UsageError
from rlhfctl.quickstart.chains import write_model
from rlhfctl.serving import scorers

QUESTION = [{"role": "user", "content": "1+2+3?"}]


def reward_model(out: Path, heads: int = 2, read: str = "last_token", architecture: str = "llama") -> Path:
    """Random but for its seed; heads of 32 are the smallest that vLLM has a CPU kernel for."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    write_model(out)
    config = json.loads((out / "config.json").read_text())
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "model_type": architecture}
    (out / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    loaded = AutoConfig.from_pretrained(out, num_labels=1)
    AutoModelForSequenceClassification.from_config(loaded).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config |= {"reward_model": {"read": read}, "normalize_reward": True, "mean": 0.3, "std": 2.0}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_rules_have_no_engine(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text("def score(samples):\n    return [0.0 for _ in samples]\n")
    with pytest.raises(UsageError, match="--engine vllm is for reward models"):
        scorers.open_served(str(tmp_path / "rules.py"), "vllm")


def test_an_encoder_is_refused() -> None:
    with pytest.raises(Refused, match="is an encoder, which --engine vllm does not run: serve it without"):
        scorers.pooled(torch.nn.Module(), "models/bert")


@pytest.mark.heavy
@pytest.mark.parametrize(("architecture", "read"), [("llama", "last_token"), ("qwen2", "token_sum")])
def test_scores_of_the_plain_engine(tmp_path: Path, architecture: str, read: str) -> None:
    """Answers of all lengths: none, and one past the model's context."""
    path = str(reward_model(tmp_path, read=read, architecture=architecture))
    answers = ["", "#6", "1+2=3\n3+3=6\n#6", "9" * 40, "2" * 100]
    rows = [
        {"id": str(place), "messages": QUESTION, "response": answer, "label": None, "metadata": {}}
        for place, answer in enumerate(answers)
    ]
    (wanted,) = scorers.open_served(path).scorers[0].score([rows])
    (found,) = scorers.open_served(path, "vllm").scorers[0].score([rows])
    assert [outcome.status for outcome in wanted] == ["ok", "ok", "ok", "ok", "error"]
    assert [outcome.error for outcome in found] == [outcome.error for outcome in wanted]
    assert len({outcome.score for outcome in wanted}) >= 4
    for left, right in zip(wanted, found, strict=True):
        assert right.score == (pytest.approx(left.score, abs=2e-5) if left.status == "ok" else None)
        assert [span.score for span in right.spans] == pytest.approx(
            [span.score for span in left.spans], abs=2e-5
        )
    assert bool(wanted[2].spans) == (read == "token_sum")


@pytest.mark.heavy
def test_heads_without_a_kernel_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        Unable, match=r"vLLM cannot run this reward model \(.*\): serve it without --engine vllm"
    ):
        scorers.open_served(str(reward_model(tmp_path, heads=4)), "vllm")


@pytest.mark.heavy
def test_its_service_in_bfloat16(
    tmp_path: Path, start: Callable[..., Any], sample: Callable[..., Any]
) -> None:
    """Over HTTP: the plain engine's scores within what bfloat16 rounds, to one client and to many, and still a clear
    answer to what it cannot score."""
    path = reward_model(tmp_path)
    pooled = start(path, "--engine", "vllm", "--dtype", "bfloat16")
    digits = range(1, 33)
    rows = [{**sample(f"r{n}", f"{n}\n#{n % 10}"), "messages": QUESTION} for n in digits]
    (plain,) = scorers.open_served(str(path)).scorers[0].score([rows])
    wanted = [outcome.score for outcome in plain]
    assert max(wanted) - min(wanted) > 0.01
    found = [each["score"] for each in pooled.ask(*rows).json()["rewards"]]
    assert found == pytest.approx(wanted, abs=0.02)
    assert found != pytest.approx(wanted, abs=1e-6)  # it is bfloat16
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda row: pooled.ask(row).json()["rewards"][0], rows))
    assert [each["id"] for each in alone] == [row["id"] for row in rows]
    assert [each["score"] for each in alone] == pytest.approx(wanted, abs=0.02)
    long = pooled.ask({**rows[0], "response": "2" * 100}).json()["rewards"][0]
    assert (long["status"], long["score"]) == ("error", None)
    assert pooled.post("/v1/rewards", json={"samples": [{**rows[0], "messages": "x"}]}).status_code == 422
    assert pooled.post("/v1/rewards", content=b"{").status_code == 400
    assert pooled.ask(rows[0]).status_code == 200
