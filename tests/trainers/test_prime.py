"""PRIME in the trainer against the formulas over plain models: rewards of tokens, advantages, and the model's own step.

Five of the six samples of three prompts have a reward, so the places of the samples are not those of the rows.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhfctl.trainers.engine import build_optimizer
from rlhfctl.trainers.experience import build
from rlhfctl.trainers.implicit_prm import learn, load_prm
from rlhfctl.trainers.trajectory import Trajectory

BETA, COEF = 0.05, 5.0
# place, prompt, tokens of the response, reward: sample 2 has none. What the shaping takes is the same for all.
SAMPLES = [
    (0, [3, 4, 5], 3, 1.0),
    (1, [3, 4, 5], 1, 0.0),
    (3, [1], 4, 0.1),
    (4, [7] * 6, 2, 1.0),
    (5, [7] * 6, 1, 0.6),
]
SHAPING = -0.3
PAIRS = ((0, 1), (1, 0), (3, 4), (4, 3))  # a row, and the other one of its prompt; row 2 is alone


def in_float64(model):
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    return plain.double().eval()


def logprobs(model, prompt, response):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize(
    "budget", [1, 9, 4096]
)  # tokens of a micro-batch: every row alone, some together, all
def test_prime_by_the_formulas(context, budget):
    ctx = context("prime", "algorithm.advantage=prime", f"train.tokens_per_microbatch={budget}")
    prm = load_prm(ctx, ctx.recipe)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prm.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    rows = []
    for place, prompt, count, reward in SAMPLES:
        response = torch.randint(0, 17, (count,), generator=random).tolist()
        rows.append(
            Trajectory(
                place, "row", prompt, response, torch.zeros(count), False, "", reward, reward + SHAPING
            )
        )
    model, start = in_float64(prm.model), in_float64(prm.start)
    now = [logprobs(model, row.prompt_ids, row.response_ids) for row in rows]
    then = [logprobs(start, row.prompt_ids, row.response_ids).detach() for row in rows]
    gained = [BETA * (a - b).detach() for a, b in zip(now, then, strict=True)]
    assert max(float(part.abs().max()) for part in gained) > 1e-2

    process, reference = prm.rewards(ctx, ctx.recipe, rows)
    for row, part in enumerate(gained):
        torch.testing.assert_close(process[row, : len(part)].double(), part, atol=1e-5, rtol=0)
        assert not process[row, len(part) :].any()

    algorithm = ctx.recipe.algorithm
    experience = build(rows, torch.zeros(5, 4), None, None, algorithm, 2, process=(process, COEF))
    for row, other in PAIRS:
        ahead = (gained[row] - gained[other].mean()).flip(0).cumsum(0).flip(0)
        expected = COEF * ahead + rows[row].shaped - rows[other].shaped
        found = experience.advantages[row, : len(expected)].double()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not experience.advantages[2].any()

    # The outcomes are the rewards as they were earned, above .5 or not: 1, 0, 0, 1, 1.
    scores = torch.stack([BETA * (a - b).sum() for a, b in zip(now, then, strict=True)])
    outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, outcomes)
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    optimizer = build_optimizer(ctx.recipe, [prm.model], prm.model.named_parameters(), prm.spec.lr, 1, 10.0)
    metrics = learn(ctx, ctx.recipe, prm, optimizer, rows, reference, 0)
    assert metrics["loss/implicit_prm"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert metrics["grad_norm/implicit_prm"] == pytest.approx(float(norm), rel=1e-3)
    assert metrics["reward/implicit_accuracy"] == float(((scores > 0) == (outcomes > 0.5)).double().mean())
    assert metrics["reward/outcome_mean"] == pytest.approx(0.6)
