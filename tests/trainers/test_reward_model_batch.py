"""A reward model's batch: what is read where, what the loss is, and that cutting it into packs changes nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rlhfctl.data.encode_judged import JudgedRow, Reading
from rlhfctl.models import attention
from rlhfctl.models.load import prepare
from rlhfctl.recipe.sections import RewardModelling
from rlhfctl.recipe.tasks import RmRecipe
from rlhfctl.trainers.reward_model import train_batch
from rlhfctl.trainers.rm_data import RmData, score_pack
from rlhfctl.trainers.rm_evaluate import Scored, metrics_of
from rlhfctl.trainers.rm_metrics import counts_of, step_metrics

CPU = torch.device("cpu")
PAD = 0
CONFIG = LlamaConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_labels=1,
    pad_token_id=None,
)


def recipe(budget=1000, **algorithm):
    return RmRecipe.model_validate(
        {
            "task": "rm",
            "name": "x",
            "policy": {"path": "p"},
            "data": {"train": [{"path": "f"}]},
            "train": {"steps": 1, "tokens_per_microbatch": budget},
            "algorithm": algorithm,
        }
    )


@pytest.fixture(scope="module")
def model():
    attention.register()
    torch.manual_seed(0)
    built = AutoModelForSequenceClassification.from_config(
        copy.deepcopy(CONFIG), attn_implementation=attention.NAME
    )
    return prepare(built, CPU)


@pytest.fixture(scope="module")
def head(model):
    """token_logits(ids): the head at every token, through transformers' own attention."""
    plain = AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIG), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())

    def token_logits(ids):
        with torch.no_grad():
            hidden = plain.model(torch.tensor([ids])).last_hidden_state
            return plain.score(hidden)[0, :, 0]

    return token_logits


def reading(length, prompt, steps=(), seed=0, padded=0):
    generator = torch.Generator().manual_seed(seed + 100 * length)
    ids = torch.randint(1, 53, (length,), generator=generator).tolist() + [PAD] * padded
    return Reading(ids, list(range(prompt, length + padded)), list(steps))


ROWS = [
    JudgedRow("a", reading(9, 4), reading(7, 4, seed=1), 0.5, None, []),
    JudgedRow("b", reading(5, 2, padded=2), reading(12, 2), 0.0, None, []),
    JudgedRow("c", reading(10, 3, steps=(4, 7, 9)), None, 0.0, None, [1.0, None, 0.0]),
    JudgedRow("d", reading(9, 5), reading(9, 5, seed=3), 2.0, None, []),
    JudgedRow("e", reading(6, 1, steps=(3,)), None, 0.0, None, [0.75]),
]


def data_of(rows):
    lengths = [len(row.chosen.ids) + (len(row.rejected.ids) if row.rejected else 0) for row in rows]
    return RmData(rows, lengths, None)


def run(model, rows, groups, **keys):
    """groups: the rows of each rank; their gradients and sums add up, as the all-reduce does."""
    spec, data = recipe(**keys), data_of(rows)
    counts = counts_of(rows)
    model.zero_grad()
    total = {}
    for group in groups:
        for name, value in train_batch(model, data, list(group), counts, spec, PAD).items():
            total[name] = total.get(name, 0.0) + value
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return step_metrics(total, counts, spec.algorithm), gradients


def test_what_each_head_reads(model, head):
    last = score_pack(model, ROWS, RewardModelling(step_coef=1.0), PAD, CPU)
    sums = score_pack(model, ROWS, RewardModelling(step_coef=1.0, score="token_sum"), PAD, CPU)
    first_step = 0
    for index, row in enumerate(ROWS):
        for side, found, summed in (
            (row.chosen, last.chosen, sums.chosen),
            (row.rejected, last.rejected, sums.rejected),
        ):
            if side is None:
                assert found[index] == summed[index] == 0
                continue
            logits = head(side.ids)
            end = max(place for place, token in enumerate(side.ids) if token != PAD)
            assert found[index].item() == pytest.approx(logits[end].item(), abs=1e-5)
            assert summed[index].item() == pytest.approx(
                logits[side.response[0] : end + 1].sum().item(), abs=1e-5
            )
        logits, begin = head(row.chosen.ids), row.chosen.response[0]
        for end in row.chosen.steps:
            assert last.steps[first_step].item() == pytest.approx(logits[end].item(), abs=1e-5)
            assert sums.steps[first_step].item() == pytest.approx(
                logits[begin : end + 1].sum().item(), abs=1e-5
            )
            begin, first_step = end + 1, first_step + 1
    assert first_step == len(last.steps) == 4


def test_the_loss_is_the_mean_over_pairs_and_over_steps(model, head):
    metrics, _ = run(model, ROWS, [range(5)], step_coef=0.5, center_coef=0.1)

    def score(side):
        return head(side.ids)[max(i for i, token in enumerate(side.ids) if token != PAD)].double()

    pairs = [(score(row.chosen), score(row.rejected), row.margin) for row in ROWS if row.rejected]
    expected = sum(
        -torch.nn.functional.logsigmoid(c - r - m) + 0.1 * (c + r) ** 2 for c, r, m in pairs
    ) / len(pairs)
    assert metrics["loss/rm"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["rm/accuracy"] == sum(float(c > r) for c, r, _ in pairs) / 3
    assert metrics["rm/margin"] == pytest.approx(sum(float(c - r) for c, r, _ in pairs) / 3, abs=1e-5)
    answers = torch.tensor([float(s) for c, r, _ in pairs for s in (c, r)])
    assert metrics["rm/score_mean"] == pytest.approx(answers.mean().item(), abs=1e-5)
    assert metrics["rm/score_std"] == pytest.approx(answers.std(correction=0).item(), abs=1e-5)
    steps = [
        (head(row.chosen.ids)[end], label)
        for row in ROWS
        for end, label in zip(row.chosen.steps, row.step_labels, strict=True)
        if label is not None
    ]
    bce = sum(torch.nn.functional.softplus(s) - y * s for s, y in steps) / 3
    assert metrics["loss/rm_step"] == pytest.approx(bce.item(), abs=1e-5)


OUTCOMES = [
    JudgedRow("a", reading(9, 4), None, 0.0, 1.0, []),
    JudgedRow("b", reading(5, 2), None, 0.0, 0.0, []),
    JudgedRow("c", reading(12, 2), reading(7, 2), 0.0, 1.0, []),
]


def test_outcomes_count_both_sides_of_a_pair(model, head):
    metrics, _ = run(model, OUTCOMES, [range(3)], objective="outcome")
    sides = [
        (OUTCOMES[0].chosen, 1),
        (OUTCOMES[1].chosen, 0),
        (OUTCOMES[2].chosen, 1),
        (OUTCOMES[2].rejected, 0),
    ]
    values = [(head(side.ids)[-1], y) for side, y in sides]
    expected = sum(torch.nn.functional.softplus(s) - y * s for s, y in values) / 4
    assert metrics["loss/rm"] == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["rm/accuracy"] == sum((float(s) > 0) == bool(y) for s, y in values) / 4


@pytest.mark.parametrize(
    "keys",
    [
        {"step_coef": 0.5, "center_coef": 0.1},
        {"step_coef": 0.5, "score": "token_sum"},
        {"objective": "step"},
        {"objective": "step", "score": "token_sum"},
    ],
)
@pytest.mark.parametrize("split", [([range(5)], 1), ([range(5)], 40), ([[0, 3], [1, 2, 4]], 1000)])
def test_splits_change_nothing(model, keys, split):
    rows = [row for row in ROWS if row.step_labels] if keys.get("objective") == "step" else ROWS
    groups = [[place for place in group if place < len(rows)] for group in split[0]]
    expected, gradients = run(model, rows, [range(len(rows))], **keys)
    found, slopes = run(model, rows, groups, budget=split[1], **keys)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(slopes[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


# Evaluation, by hand


def pair(row, chosen, rejected, lengths=(5, 5), margin=0.0):
    return Scored(row, (chosen, lengths[0]), (rejected, lengths[1]), None, margin, [])


def test_pairs_of_an_evaluation():
    scored = [
        pair(0, 2.0, 1.0, (9, 5)),
        pair(1, 0.0, 3.0, (9, 5)),
        pair(2, 1.0, 1.0),
        pair(3, 5.0, 1.0, (5, 9)),
    ]
    metrics = metrics_of(scored, recipe())
    assert metrics["eval/accuracy"] == 2.5 / 4
    assert metrics["eval/length_accuracy"] == 2.5 / 4
    assert metrics["eval/margin"] == 0.5
    assert metrics["eval/score_mean"] == 14 / 8
    gaps = torch.tensor([1.0, -3.0, 0.0, 4.0]).double()
    assert metrics["eval/loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(gaps).mean().item(), abs=1e-12
    )
    # Confidences .731, .953, .5, .982, right 1, 0, 1/2, 1; the two above .9 share a bin.
    sure = gaps.abs().sigmoid().tolist()
    expected = (1 - sure[0] + abs(sure[1] + sure[3] - 1) + 0.0) / 4
    assert metrics["eval/calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_answers_and_steps_of_an_evaluation():
    scored = [
        Scored(0, (2.0, 9), None, 1.0, 0.0, [(1.0, 1.0), (-1.0, 0.0), (-2.0, 0.0)]),
        Scored(1, (-1.0, 3), None, 1.0, 0.0, [(3.0, 1.0), (1.0, 0.0)]),
        Scored(2, (-3.0, 5), None, 0.0, 0.0, [(0.5, 1.0)]),
    ]
    outcome = metrics_of(scored, recipe(objective="outcome", step_coef=1.0))
    assert outcome["eval/accuracy"] == pytest.approx(2 / 3)
    assert outcome["eval/auc"] == 1.0
    assert outcome["eval/length_auc"] == 0.5
    assert outcome["eval/step_accuracy"] == pytest.approx(5 / 6)
    assert outcome["eval/first_wrong_step"] == 0.5  # of the two answers with a wrong step one is found
    assert outcome["eval/step_auc"] == 7.5 / 9
    step = metrics_of(scored, recipe(objective="step"))
    assert step["eval/accuracy"] == outcome["eval/step_accuracy"]
    assert "eval/margin" not in step


def test_padding_token(chains):
    from rlhfctl.templates.encode import ChatEncoder
    from rlhfctl.trainers.rm_data import padding_id

    encoder = ChatEncoder.from_path(chains / "model")
    assert padding_id(encoder, None) == encoder.pad_id
    without = SimpleNamespace(pad_id=None, tokenizer=encoder.tokenizer, tokens={}, stop_ids=encoder.stop_ids)
    assert padding_id(without, 3) == 3
    assert padding_id(without, encoder.stop_ids[0]) is None
    without.tokens = {"bos_token": "7"}
    assert padding_id(without, encoder.stop_ids[0]) == encoder.tokenizer.token_to_id("7")
