"""Hand numbers for the cross-entropy. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import sft


@pytest.fixture(name="m")
def module() -> ModuleType:
    return sft


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_numbers(m: ModuleType) -> None:
    # p = 1/2, 1/4, 1/8 -> 1, 2, 3 times log 2; weights 1/2, 1/4, 1/4: (0.5 + 0.5 + 0.75) log 2
    logprobs = -math.log(2) * doubles(1, 2, 3)
    loss, metrics = m.cross_entropy(logprobs, doubles(0.5, 0.25, 0.25))
    assert_close(loss, torch.tensor(1.75 * math.log(2), dtype=torch.float64), rtol=0, atol=1e-15)
    assert metrics["tokens"] == 3
    assert_close(metrics["nll"], torch.tensor(6 * math.log(2), dtype=torch.float64), rtol=0, atol=1e-15)


def test_gradient_is_minus_the_weight(m: ModuleType) -> None:
    # d loss / d logp_i = -w_i: a step against the gradient makes the token likelier.
    logprobs = doubles(-1, -2).requires_grad_()
    loss, metrics = m.cross_entropy(logprobs, doubles(0.75, 0.25))
    loss.backward()
    assert logprobs.grad is not None
    assert_close(logprobs.grad, doubles(-0.75, -0.25), rtol=0, atol=0)
    assert not metrics["nll"].requires_grad


def test_positions_of_weight_zero_take_no_part(m: ModuleType) -> None:
    for junk in (-7.0, math.nan, -math.inf):
        logprobs = doubles(-1, junk).requires_grad_()
        loss, metrics = m.cross_entropy(logprobs, doubles(0.5, 0))
        loss.backward()
        assert loss == 0.5
        assert metrics == {"tokens": 1, "nll": 1.0}
        assert logprobs.grad is not None
        assert logprobs.grad.tolist() == [-0.5, 0.0]


def test_equals_torch_cross_entropy_over_trained_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 5))
    labels[0, 3:], labels[2, :2] = -100, -100
    trained = labels != -100
    logprobs = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(-1)
    weights = trained.double() / trained.sum()
    loss, _ = sft.cross_entropy(logprobs, weights)
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 11), labels.view(-1), ignore_index=-100)
    assert_close(loss, expected, rtol=0, atol=1e-14)


def test_the_trainer_s_fused_loss_is_this_one() -> None:
    from rlhfctl.models.head import weighted_nll

    torch.manual_seed(1)
    hidden = torch.randn(9, 6, requires_grad=True)
    head = torch.randn(13, 6, requires_grad=True)
    targets, weights = torch.randint(0, 13, (9,)), torch.rand(9)
    weights[4] = 0.0
    logprobs = (hidden @ head.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    loss, _ = sft.cross_entropy(logprobs, weights)
    expected = torch.autograd.grad(loss, (hidden, head))
    fused = weighted_nll(hidden, head, targets, weights)
    assert_close(fused, loss, rtol=0, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(fused, (hidden, head)), expected, strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-5)
