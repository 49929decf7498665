import math

import pytest
import torch
from torch import nn

from rlhfctl.recipe.sections import Optim
from rlhfctl.trainers.optimizer import Optimizer, clip_and_step, scheduled_lr


def optim(**changes):
    return Optim(**({"lr": 0.1, "schedule": "constant", "warmup_ratio": 0.0} | changes))


def test_schedules_by_hand():
    cosine = optim(schedule="cosine", warmup_ratio=0.2, min_lr_ratio=0.1)
    # 10 steps, 2 of warm-up: 0.5, 1.0, then 8 steps of cosine from 1 towards 0.1.
    assert scheduled_lr(cosine, 1.0, 0, 10) == pytest.approx(0.5)
    assert scheduled_lr(cosine, 1.0, 1, 10) == pytest.approx(1.0)
    assert scheduled_lr(cosine, 1.0, 2, 10) == pytest.approx(1.0)
    assert scheduled_lr(cosine, 1.0, 6, 10) == pytest.approx(0.1 + 0.9 * 0.5)
    last = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8))
    assert scheduled_lr(cosine, 1.0, 9, 10) == pytest.approx(last)
    linear = optim(schedule="linear")
    assert [scheduled_lr(linear, 1.0, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert scheduled_lr(optim(), 2.0, 99, 100) == 2.0


def test_first_adamw_step_by_hand():
    """Bias-corrected moments of the first step are g and g^2: the step is lr * sign(g), after lr * decay * w."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    stepped = Optimizer([("w", weight)], optim(weight_decay=0.5), 0.1, 10)
    weight.grad = torch.tensor([[3.0, -4.0]])
    assert clip_and_step([stepped], None) == [pytest.approx(5.0)]
    expected = torch.tensor([[1.0 * (1 - 0.05) - 0.1, -2.0 * (1 - 0.05) + 0.1]])
    torch.testing.assert_close(weight.data, expected, atol=1e-6, rtol=0)
    assert weight.grad is None


def test_vectors_carry_no_weight_decay():
    bias = nn.Parameter(torch.tensor([1.0]))
    stepped = Optimizer([("b", bias)], optim(weight_decay=0.5), 0.1, 10)
    bias.grad = torch.tensor([2.0])
    clip_and_step([stepped], None)
    assert bias.item() == pytest.approx(0.9)


def test_clip_scales_the_gradient_to_the_limit():
    weight = nn.Parameter(torch.zeros(1, 2))
    stepped = Optimizer([("w", weight)], optim(), 0.1, 10)
    weight.grad = torch.tensor([[3.0, 4.0]])
    clip_and_step([stepped], 1.0)
    moments = stepped.adam.state[weight]["exp_avg"] / (1 - 0.9)
    torch.testing.assert_close(moments, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)


def test_a_non_finite_gradient_is_returned_and_not_applied():
    weight = nn.Parameter(torch.ones(1, 2))
    stepped = Optimizer([("w", weight)], optim(), 0.1, 10)
    weight.grad = torch.tensor([[math.nan, 1.0]])
    assert not math.isfinite(clip_and_step([stepped], 1.0)[0])
    assert weight.data.tolist() == [[1.0, 1.0]]


def test_bfloat16_weights_follow_float32_masters():
    """Steps too small for bfloat16 must add up in the master: 1 + 8 * 0.001 rounds to 1.0078125, not to 1."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    stepped = Optimizer([("w", weight)], optim(lr=0.001), 0.001, 100)
    for _ in range(8):
        weight.grad = torch.tensor([[-1.0]], dtype=torch.bfloat16)
        clip_and_step([stepped], None)
    assert stepped.masters[0].item() == pytest.approx(1.008, abs=1e-5)
    assert weight.item() == 1.0078125


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_continues_bit_for_bit(dtype):
    def run(steps, weight, stepped):
        for step in steps:
            weight.grad = torch.full((2, 3), 0.1 * (step + 1), dtype=dtype)
            clip_and_step([stepped], 1.0)

    start = torch.arange(6, dtype=dtype).view(2, 3)
    weight = nn.Parameter(start.clone())
    stepped = Optimizer([("w", weight)], optim(schedule="cosine"), 0.1, 6)
    run(range(3), weight, stepped)
    saved, values = {k: v.clone() for k, v in stepped.state().items()}, weight.data.clone()
    run(range(3, 6), weight, stepped)

    again = nn.Parameter(values)
    resumed = Optimizer([("w", again)], optim(schedule="cosine"), 0.1, 6)
    resumed.load_state(saved)
    run(range(3, 6), again, resumed)
    assert torch.equal(again.data, weight.data)
    assert resumed.steps == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_parameters_stand_still_and_their_moments_with_them(dtype):
    held, moving = nn.Parameter(torch.ones(2, 2, dtype=dtype)), nn.Parameter(torch.ones(2, 2, dtype=dtype))
    both = Optimizer([("policy.w", held), ("critic.w", moving)], optim(weight_decay=0.5), 0.1, 10)
    both.held = "policy."
    held.grad, moving.grad = torch.full_like(held, 3.0), torch.full_like(moving, 2.0)
    assert clip_and_step([both], None) == [
        pytest.approx(4.0)
    ]  # sqrt(4 * 2^2): the held gradient is not in it
    assert torch.equal(held.data, torch.ones(2, 2, dtype=dtype))
    assert not torch.equal(moving.data, torch.ones(2, 2, dtype=dtype))
    assert [name for name in both.state() if name.startswith("policy.w|exp")] == []
    both.held = None
    held.grad = torch.full_like(held, 3.0)
    clip_and_step([both], None)
    assert float(held.data[0, 0]) == pytest.approx(1 * (1 - 0.05) - 0.1, abs=4e-3)  # its first step
    assert both.steps == 2


def test_an_optimizer_of_held_parameters_alone_has_no_norm():
    weight = nn.Parameter(torch.ones(2, 2))
    alone = Optimizer([("policy.w", weight)], optim(), 0.1, 10)
    alone.held = "policy."
    assert clip_and_step([alone], 1.0) == [0.0]
    assert torch.equal(weight.data, torch.ones(2, 2))
