import math

import pytest
import torch

from rlhfctl.recipe.base import COLDEST
from rlhfctl.rollout.sampling import draw, invert, uniforms
from rlhfctl.trainers.value_fit import Order


def test_inverse_cdf_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(4, -1)
    ids, logprobs = draw(logits, torch.tensor([0.0, 0.19, 0.21, 0.95]), 1.0, 1.0)
    assert ids.tolist() == [0, 0, 1, 2]
    expected = [math.log(0.2), math.log(0.2), math.log(0.5), math.log(0.3)]
    torch.testing.assert_close(logprobs, torch.tensor(expected))


def test_temperature_divides_logits_and_the_logprobs_are_the_sampled_distribution():
    logits = torch.tensor([[0.0, 2.0]])
    _, logprobs = draw(logits, torch.tensor([0.999]), 2.0, 1.0)
    assert float(logprobs) == pytest.approx(1.0 - math.log(1 + math.e))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_coldest_temperature_draws_what_has_mass(top_p):
    """Of logits up to 10^4: the largest, with log-probabilities that are numbers; of two equal ones either."""
    generator = torch.Generator().manual_seed(3)
    logits = 1e4 * torch.randn(50, 300, generator=generator)
    uniform = torch.rand(50, generator=generator)
    ids, logprobs = draw(logits, uniform, COLDEST, top_p)
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert logprobs.tolist() == [0.0] * 50
    ids, logprobs = draw(torch.tensor([[5.0, 5.0, 4.0]] * 2), torch.tensor([0.3, 0.7]), COLDEST, top_p)
    assert ids.tolist() == [0, 1]
    torch.testing.assert_close(logprobs, torch.full((2,), math.log(0.5)))


def test_the_largest_seed_has_streams_of_its_own():
    large = 2**63 - 1
    assert not torch.equal(uniforms(large, 0, 0, 8), uniforms(large - 1, 0, 0, 8))
    order = Order(8, 4, large)
    assert sorted(order.batch(0) + order.batch(1)) == list(range(8))


def test_greedy():
    ids, _ = draw(torch.tensor([[0.0, 3.0, 1.0]]), None, 1.0, 1.0)
    assert ids.tolist() == [1]


def test_frequencies_over_many_uniforms():
    logits = torch.log(torch.tensor([[0.05, 0.6, 0.25, 0.1]]))
    grid = (torch.arange(10000) + 0.5) / 10000
    ids, _ = draw(logits.expand(10000, -1), grid, 1.0, 1.0)
    torch.testing.assert_close(
        torch.bincount(ids) / 10000, torch.tensor([0.05, 0.6, 0.25, 0.1]), atol=2e-4, rtol=0
    )


def test_top_p_keeps_the_smallest_set_with_that_mass():
    logits = torch.log(torch.tensor([[0.05, 0.6, 0.25, 0.1]]))
    grid = (torch.arange(10000) + 0.5) / 10000
    ids, _ = draw(logits.expand(10000, -1), grid, 1.0, 0.8)
    found = torch.bincount(ids, minlength=4) / 10000
    torch.testing.assert_close(found, torch.tensor([0.0, 0.6 / 0.85, 0.25 / 0.85, 0.0]), atol=2e-4, rtol=0)


def test_streams_are_functions_of_seed_step_and_index():
    assert torch.equal(uniforms(1, 2, 3, 8), uniforms(1, 2, 3, 8))
    assert torch.equal(uniforms(1, 2, 3, 8), uniforms(1, 2, 3, 20)[:8])
    others = [uniforms(0, 2, 3, 8), uniforms(1, 3, 3, 8), uniforms(1, 2, 4, 8), uniforms(2, 2, 3, 8)]
    assert all(not torch.equal(uniforms(1, 2, 3, 8), other) for other in others)


def test_streams_look_uniform_and_unrelated_between_neighbours():
    rows = torch.stack([uniforms(17, step, index, 50) for step in range(20) for index in range(50)])
    assert float(rows.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(rows.std()) == pytest.approx(1 / math.sqrt(12), abs=0.005)
    centred = rows - 0.5
    neighbours = (centred[1:] * centred[:-1]).mean() * 12
    assert abs(float(neighbours)) < 0.02


@pytest.mark.parametrize("vocabulary", [3, 64, 65, 4096])
def test_blocks_invert_the_distribution_function(vocabulary):
    """Against one running sum in double: every draw lands in its token's interval, at edges of blocks too."""
    generator = torch.Generator().manual_seed(vocabulary)
    mass = (3 * torch.randn(200, vocabulary, generator=generator)).softmax(-1)
    mass[:, ::7] = 0
    uniform = torch.rand(200, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    ids = invert(mass, uniform)
    upto = mass.double().cumsum(-1)
    target = uniform.double() * upto[:, -1]
    rows = torch.arange(200)
    start = upto[rows, ids] - mass[rows, ids].double()
    assert bool((target >= start - 1e-6).all())
    assert bool((target <= upto[rows, ids] + 1e-6).all())
    assert bool((mass[rows, ids] > 0).all())
    assert len(set(ids.tolist())) > min(vocabulary, 60) / 2


def test_a_draw_never_lands_on_what_has_no_mass():
    """A single token of any block, and the largest uniform number there is."""
    for place in (0, 63, 64, 99):
        mass = torch.zeros(2, 100)
        mass[:, place] = 1 / 3
        assert invert(mass, torch.tensor([0.0, 1 - 2**-24])).tolist() == [place, place]
