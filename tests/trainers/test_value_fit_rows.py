"""What a value is fitted to, and that the values its loss sees are those a search reads later."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from rlhfctl.data.encode import PromptRow
from rlhfctl.data.samples import Sample
from rlhfctl.evaluation.answers import Answer
from rlhfctl.models.load import load_causal_lm
from rlhfctl.recipe.sections import Policy
from rlhfctl.trainers.value_fit import Row, fresh_value, loss_of, rows_of

STOP = 9


@pytest.fixture(scope="module")
def policy(chains: Path) -> nn.Module:
    spec = Policy(from_config=str(chains / "model"), tokenizer=str(chains / "model"))
    return load_causal_lm(spec, torch.device("cpu"), 1)


@pytest.mark.parametrize("head", ["scalar", "token_sum"])
def test_trained_values_are_those_that_search_reads(policy: nn.Module, head: str) -> None:
    """Cross-entropies of what `at` reads at every prefix; the last response is empty."""
    model = fresh_value(policy, head)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if not name.startswith("trunk."):
            parameter.data.normal_(generator=generator)
    rows = [Row([1, 2, 3, 4, 5, 6], 2, True), Row([7, 8, 9], 1, False), Row([4, 4], 2, True)]
    values = model.at([row.ids for row in rows], [row.places for row in rows], 4096, [2, 1, 2])
    assert [len(found) for found in values] == [5, 3, 1]
    expected = sum(
        functional.binary_cross_entropy_with_logits(
            torch.tensor(found), torch.full((len(found),), float(row.right)), reduction="sum"
        ).item()
        for found, row in zip(values, rows, strict=True)
    )
    assert loss_of(model, [0, 1, 2], rows).item() == pytest.approx(expected, rel=1e-4)


def test_rows_end_before_the_stop_token_and_truncated_or_unjudged_answers_are_none() -> None:
    prompts = [PromptRow(Sample(name, [], None, None), ids) for name, ids in (("a", [1, 2]), ("b", [3]))]
    answers = [
        answer([5, STOP], True),
        answer([6, 7], False, truncated=True),
        answer([STOP], False),
        answer([8, STOP], None),
    ]
    rows = rows_of(prompts, answers)
    assert [(row.ids, row.prompt, row.right) for row in rows] == [([1, 2, 5], 2, True), ([1, 2], 2, False)]


def answer(ids: list[int], correct: bool | None, truncated: bool = False) -> Answer:
    return Answer("", ids, len(ids), truncated, 0.0, 1, correct=correct)
