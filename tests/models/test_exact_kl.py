"""The chunked log-probabilities and exact KL against the plain softmax, values and gradients."""

import pytest
import torch

from rlhfctl.models import exact_kl, head


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_values_and_gradients_are_those_of_the_whole_softmax(monkeypatch, chunk):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)  # chunks of 16 rows at the least
    monkeypatch.setattr(exact_kl, "ROWS_ELEMENTS", 3 * chunk)  # normalised row by row
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 41, 8, 29
    hidden, ref_hidden = (torch.randn(rows, width, generator=generator) for _ in range(2))
    weight, ref_weight = (torch.randn(vocabulary, width, generator=generator) for _ in range(2))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    a, b = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)

    def gradients(compute):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, ref, kl = compute(h, w)
        (logprobs @ a + kl @ b).backward()
        return [logprobs.detach(), ref.detach(), kl.detach(), h.grad, w.grad]

    def plain(h, w):
        ours, theirs = (h @ w.t()).log_softmax(1), (ref_hidden @ ref_weight.t()).log_softmax(1)
        pick = targets[:, None]
        kl = (ours.exp() * (ours - theirs)).sum(1)
        return ours.gather(1, pick)[:, 0], theirs.gather(1, pick)[:, 0], kl

    found = gradients(lambda h, w: exact_kl.logprobs_and_kl(h, w, targets, ref_hidden, ref_weight))
    for ours, expected in zip(found, gradients(plain), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    same = exact_kl.logprobs_and_kl(hidden, weight, targets, hidden, weight)[2]
    assert same.abs().max() < 1e-6
