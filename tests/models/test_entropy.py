"""The gradient of the entropy through the whole softmax, computed in chunks."""

import pytest
import torch

from rlhfctl.models import head

ROWS, WIDTH, VOCABULARY, TEMPERATURE = 70, 6, 11, 0.8


def problem():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    on_logprobs, on_entropy = torch.randn(2, ROWS, generator=generator)
    return hidden, weight, targets, on_logprobs, on_entropy


def exact(hidden, weight, targets):
    """In double, the textbook way."""
    logprobs = (hidden.double() @ weight.double().t() / TEMPERATURE).log_softmax(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("terms", ["both", "entropy"])
def test_the_gradient_is_that_of_the_whole_softmax(monkeypatch, kept, terms):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 16 * VOCABULARY)  # five chunks, the last one shorter
    if not kept:
        monkeypatch.setattr(head, "KEEP_ELEMENTS", 0)
    hidden, weight, targets, on_logprobs, on_entropy = problem()
    if terms == "entropy":
        on_logprobs = torch.zeros_like(on_logprobs)
    found = []
    for function in (
        lambda h, w: head.token_logprobs(h, w, targets, TEMPERATURE),
        lambda h, w: exact(h, w, targets),
    ):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        logprobs, entropy = function(*inputs)
        loss = (entropy * on_entropy).sum()
        if terms == "both":
            loss = loss + (logprobs * on_logprobs).sum()
        loss.backward()
        found.append((entropy.detach().double(), *(x.grad for x in inputs)))
    for mine, theirs in zip(*found, strict=True):
        assert float(theirs.abs().max()) > 0.1
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def test_finite_differences():
    """Central differences of the entropy's sum along random directions, in double."""
    hidden, weight, targets, _, on_entropy = problem()
    start = hidden.clone().requires_grad_()
    (head.token_logprobs(start, weight, targets, TEMPERATURE)[1] * on_entropy).sum().backward()
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        direction = torch.randn(ROWS, WIDTH, generator=generator).double()
        ends = [exact(hidden.double() + sign * 1e-5 * direction, weight, targets)[1] for sign in (1, -1)]
        slope = float(((ends[0] - ends[1]) * on_entropy).sum() / 2e-5)
        assert float((start.grad.double() * direction).sum()) == pytest.approx(slope, abs=2e-4)


def test_probabilities_that_underflow_have_no_gradient_and_no_nan():
    hidden = torch.tensor([[100.0, -100.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])
    _, entropy = head.token_logprobs(hidden, weight, torch.tensor([0]))
    entropy.sum().backward()
    assert float(entropy.detach()) == 0.0
    assert hidden.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("large", [False, True])
def test_without_entropy_the_log_probabilities_are_the_same(monkeypatch, large):
    if large:
        monkeypatch.setattr(head, "in_tiles", lambda weight: True)
    hidden, weight, targets, on_logprobs, _ = problem()
    gradients = []
    for wanted in (True, False):
        leaf = hidden.clone().requires_grad_()
        logprobs, entropy = head.token_logprobs(leaf, weight, targets, TEMPERATURE, wanted)
        assert bool(entropy.any()) == wanted
        (logprobs * on_logprobs).sum().backward()
        gradients.append(leaf.grad)
        with torch.no_grad():
            assert torch.equal(
                head.token_logprobs(hidden, weight, targets, TEMPERATURE, wanted)[0], logprobs.detach()
            )
    assert torch.equal(*gradients)
