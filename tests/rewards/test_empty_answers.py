"""Reward models of tokens and of steps score an answer that the policy ended at once: one stop token is no error."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhfctl.quickstart.chains import write_model
from rlhfctl.recipe.sections import ModelSource
from rlhfctl.rewards.model import ModelReward

MEAN, STD = 0.25, 2.0
MESSAGES = [{"role": "user", "content": "1+2*3?"}]


def reward_model(directory: Path, read: str, ending: str = "{{ eos_token }}") -> ModelReward:
    """Random but for its seed, with a template that writes `ending` behind each answer."""
    write_model(directory)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(directory, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"reward_model": {"read": read}, "normalize_reward": True, "mean": MEAN, "std": STD}
    settings["pad_token_id"] = None
    (directory / "config.json").write_text(json.dumps(settings))
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + ending + "{% endif %}"
        "{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    return ModelReward(
        ModelSource(kind="model", path=str(directory), span_weight=1.0), granularity=GIVES[read]
    )


GIVES = {"token_sum": "token", "step_end": "step"}


@pytest.mark.parametrize("response", ["", "\n", "\n\n"])
@pytest.mark.parametrize("ending", ["{{ eos_token }}", "{{ eos_token }}\n", ""])
@pytest.mark.parametrize("read", ["token_sum", "step_end"])
def test_what_stands_behind_the_prompt_is_read(tmp_path: Path, read: str, ending: str, response: str) -> None:
    source = reward_model(tmp_path, read, ending)
    samples = [
        {"id": str(index), "messages": MESSAGES, "response": text, "label": None}
        for index, text in enumerate([response, "1+2=3\n#9"])
    ]
    empty, other = source.score(samples)
    assert (empty.status, other.status) == ("ok", "ok")
    prompt = source.bridge.rm.encode_prompt(MESSAGES)
    whole = source.bridge.rm.encode_text(
        source.bridge.rm.render([*MESSAGES, {"role": "assistant", "content": response}])
    )
    assert whole[: len(prompt)] == prompt
    last = len(whole) - 1
    places = list(range(len(prompt), len(whole))) or [last] if read == "token_sum" else [last]
    (values,) = source.model.at([whole], [places], 512)
    assert empty.score == pytest.approx((sum(values) - MEAN) / STD, abs=1e-5)
    (span,) = empty.spans  # its score counts, whichever of the two weights it is given
    assert (span.start, span.end) == (0, len(response))
    assert span.score == pytest.approx(empty.score, abs=1e-6)


def test_a_step_without_a_number_is_no_score(tmp_path: Path) -> None:
    """Beside NaN the lowest of the others is a number."""
    source = reward_model(tmp_path, "step_end")
    weights = source.model.trunk.get_input_embeddings().weight
    weights.data[source.bridge.rm.tokenizer.token_to_id("#")] = float("nan")
    responses = ("1+2=3\n#9", "1+2=3\n9")
    bad, good = source.score(
        [{"id": text, "messages": MESSAGES, "response": text, "label": None} for text in responses]
    )
    assert (bad.status, bad.score, bad.error) == ("error", None, "the score is nan")
    assert good.status == "ok"
