"""The head in tiles: the values and gradients of log_softmax in float64; gradients added straight to what is there."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhfctl.models import head_tiles
from rlhfctl.models.direct_gradient import DirectEmbedding, allow
from rlhfctl.models.head import token_logprobs, weighted_nll

ROWS, HIDDEN, VOCABULARY = 11, 8, 37
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles, the last one smaller."""
    monkeypatch.setattr(head_tiles, "TILE", 8)
    monkeypatch.setattr(head_tiles, "LARGE", 32)


def case() -> Case:
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, HIDDEN) * 3, torch.randn(VOCABULARY, HIDDEN)
    return hidden, weight, torch.randint(0, VOCABULARY, (ROWS,)), torch.rand(ROWS)


def exact(found: Case, temperature: float, entropy_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, without tiles."""
    hidden, weight, targets, weights = (x.double() if x.is_floating_point() else x for x in found)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    every = functional.log_softmax(hidden @ weight.t() / temperature, 1)
    loss = -(weights * every.gather(1, targets[:, None]).squeeze(1)).sum()
    loss = loss - entropy_coef * (weights * -(every.exp() * every).sum(1)).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def near(found: Tensor | None, wanted: Tensor) -> bool:
    assert found is not None
    return bool((found.double() - wanted).norm() <= 1e-6 * wanted.norm())


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("temperature", "entropy_coef"), [(1.0, 0.0), (0.7, 0.0), (1.0, 0.3), (0.7, 0.3)])
def test_tiles_are_log_softmax(temperature: float, entropy_coef: float, direct: bool) -> None:
    hidden, weight, targets, weights = case()
    wanted = exact((hidden, weight, targets, weights), temperature, entropy_coef)
    hidden, matrix = hidden.requires_grad_(), nn.Parameter(weight)
    if direct:
        allow(matrix)
        matrix.grad = torch.ones_like(matrix)  # of an earlier pack
    logprobs, entropy = token_logprobs(hidden, matrix, targets, temperature)
    loss = -(weights * logprobs).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (weights * entropy).sum()
    loss.backward()
    assert near(loss.detach(), wanted[0])
    assert near(hidden.grad, wanted[1])
    assert matrix.grad is not None
    assert near(matrix.grad - (1.0 if direct else 0.0), wanted[2])


def test_the_known_loss_goes_in_tiles_too() -> None:
    found = case()
    wanted = exact(found, 1.0, 0.0)
    hidden, matrix = found[0].requires_grad_(), nn.Parameter(found[1])
    loss = weighted_nll(hidden, matrix, found[2], found[3])
    loss.backward()
    assert near(loss.detach(), wanted[0])
    assert near(hidden.grad, wanted[1])
    assert near(matrix.grad, wanted[2])


def test_from_which_vocabulary_on() -> None:
    assert [head_tiles.in_tiles(torch.empty(size, 1)) for size in (31, 32, 33)] == [False, True, True]


def test_a_logit_far_above_the_others_overflows_nothing() -> None:
    hidden, weight, targets, _ = case()
    logprobs, entropy = token_logprobs(hidden * 1000, weight, targets)
    wanted = functional.log_softmax(hidden.double() @ weight.double().t() * 1000, 1)
    assert torch.allclose(logprobs.double(), wanted.gather(1, targets[:, None]).squeeze(1), rtol=1e-5)
    assert bool(entropy.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_adds_its_rows_to_the_gradient(dtype: torch.dtype) -> None:
    """Tokens that occur often included; beside what the head has added."""
    torch.manual_seed(1)
    ids = torch.randint(0, 5, (1, 200))
    onto = torch.randn(1, 200, HIDDEN).to(dtype)
    plain = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64)
    direct = DirectEmbedding(VOCABULARY, HIDDEN, dtype=dtype)
    allow(direct.weight)
    direct.weight.grad = torch.ones_like(direct.weight)
    (plain(ids) * onto.double()).sum().backward()
    (direct(ids) * onto).sum().backward()
    assert plain.weight.grad is not None
    wanted = plain.weight.grad + 1.0
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # one rounding of the sum
    assert (direct.weight.grad.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.equal(direct(ids), direct.weight[ids])


def test_a_frequent_token_counts_every_time() -> None:
    """1,000 gradients of 1: added one after the other in bfloat16 they would end at 256."""
    direct = DirectEmbedding(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    allow(direct.weight)
    direct(torch.full((1, 1000), 3)).sum().backward()
    assert direct.weight.grad is not None
    assert direct.weight.grad[3].tolist() == [1000.0] * HIDDEN
    assert float(direct.weight.grad.float().sum()) == 1000.0 * HIDDEN
