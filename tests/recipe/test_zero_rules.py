"""What the deepspeed section and the rest of a recipe must agree on, and what the machine must have for it."""

import pytest

from rlhfctl.errors import UsageError
from rlhfctl.preflight import deepspeed
from rlhfctl.preflight.inputs import Inputs
from rlhfctl.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("deepspeed={offload: optimizer}",), "offload optimizer needs deepspeed.zero_stage 1, 2 or 3"),
        (("deepspeed={zero_stage: 2, offload: all}",), "needs deepspeed.zero_stage 3, not 2"),
        (("deepspeed={zero_stage: 2, persist_below: 0}",), "persist_below is ignored"),
        (("deepspeed={bucket_elements: 5}",), "bucket_elements is ignored"),
        (("deepspeed={zero_stage: 0}", "policy.dtype=bfloat16"), "keeps no float32 master weights"),
        (("deepspeed={zero_stage: 4}",), "deepspeed.zero_stage must be one of 0, 1, 2, 3, not 4"),
        (
            ("deepspeed={zero_stage: 1}", "value_model.shared_trunk=true", "algorithm.value_warmup_steps=2"),
            "steps a part of one engine",
        ),
    ],
)
def test_sections_that_do_not_fit(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe("quickstart/ppo", overrides)
    assert said in str(error.value)


def test_offload_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("quickstart/sft", ["deepspeed={zero_stage: 1, offload: optimizer}"]).recipe
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = deepspeed.deepspeed_findings(Inputs(recipe, None, True), bfloat16=False)
    assert [(finding.id, finding.exit_code) for finding in found] == [("X030", 4)]
    assert "no-such-compiler" in found[0].title
