"""Hand numbers for the group baselines. They take the module, so that test_mutations.py can hand in a broken one."""

import math
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import advantages


@pytest.fixture(name="m")
def module() -> ModuleType:
    return advantages


def doubles(*values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two prompts of three samples: 1, 2, 6 (mean 3, squared distances 4 + 1 + 9 = 14) and three times 0.1.
SCORES = doubles(1, 2, 6, 0.1, 0.1, 0.1)


def test_rloo_compares_with_the_mean_of_the_others(m: ModuleType) -> None:
    # 1 - (2 + 6) / 2 = -3,  2 - (1 + 6) / 2 = -1.5,  6 - (1 + 2) / 2 = 4.5
    found, flat = m.group_advantages(SCORES, 3, "rloo", 1e-4)
    assert_close(found, doubles(-3, -1.5, 4.5, 0, 0, 0), rtol=0, atol=1e-14)
    assert flat == 1


def test_the_mean_alone_is_the_baseline(m: ModuleType) -> None:
    for estimator in ("dr_grpo", "reinforce_baseline"):
        found, flat = m.group_advantages(SCORES, 3, estimator, 1e-4)
        assert_close(found, doubles(-2, -1, 3, 0, 0, 0), rtol=0, atol=1e-14)
        assert flat == 1


def test_grpo_divides_by_the_unbiased_deviation_plus_eps(m: ModuleType) -> None:
    # std = sqrt(14 / 2) = 2.6457513; with eps .5: -2, -1, 3 over 3.1457513
    found, flat = m.group_advantages(SCORES, 3, "grpo", 0.5)
    scale = math.sqrt(7) + 0.5
    assert_close(found, doubles(-2 / scale, -1 / scale, 3 / scale, 0, 0, 0), rtol=0, atol=1e-14)
    assert flat == 1


def test_equal_scores_give_exact_zeros_in_float32(m: ModuleType) -> None:
    # 0.1 + 0.1 + 0.1 over 3 is not 0.1 in float32: the noise over eps 1e-9 would be an advantage of 7.
    for estimator in m.GROUP_ESTIMATORS:
        found, flat = m.group_advantages(torch.full((6,), 0.1), 3, estimator, 1e-9)
        assert found.tolist() == [0.0] * 6
        assert flat == 2


def test_samples_without_a_score_are_left_out(m: ModuleType) -> None:
    # Group 1: 1, 3 and a failed one: mean 2, rloo 1 - 3 = -2 and 3 - 1 = 2, std = sqrt((1 + 1) / 1).
    # Group 2: one score alone has no baseline. Group 3: none at all.
    nan = math.nan
    scores = doubles(1, 3, nan, nan, 7, nan, nan, nan, nan)
    valid = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 0])
    rest = [0.0] * 7
    expected = {"rloo": [-2, 2], "dr_grpo": [-1, 1], "grpo": [-1 / math.sqrt(2), 1 / math.sqrt(2)]}
    for estimator, numbers in expected.items():
        found, flat = m.group_advantages(scores, 3, estimator, 0.0, valid)
        assert_close(found, doubles(*numbers, *rest), rtol=0, atol=1e-14)
        assert flat == 2


def test_a_failed_sample_beside_negative_scores_is_not_a_zero(m: ModuleType) -> None:
    # Scores -1, -1 and a failed one: no difference, no gradient; a zero in its place would say otherwise.
    found, flat = m.group_advantages(doubles(-1, -1, math.nan), 3, "rloo", 0.0, torch.tensor([1, 1, 0]))
    assert found.tolist() == [0, 0, 0]
    assert flat == 1
    # And beside -1, -3 it neither moves the mean nor the deviation.
    found, flat = m.group_advantages(doubles(-1, -3, math.nan), 3, "grpo", 0.0, torch.tensor([1, 1, 0]))
    assert_close(found, doubles(1 / math.sqrt(2), -1 / math.sqrt(2), 0), rtol=0, atol=1e-14)
    assert flat == 0


def test_discounted_returns(m: ModuleType) -> None:
    # gamma .5: G_2 = 4, G_1 = -1 + .5 * 4 = 1, G_0 = 2 + .5 * 1 = 2.5; the second row ends after one token
    found = m.discounted_returns(doubles([2, -1, 4], [3, 0, 0]), doubles([1, 1, 1], [1, 0, 0]), 0.5)
    assert_close(found, doubles([2.5, 1, 4], [3, 0, 0]), rtol=0, atol=0)


def test_discounted_returns_skip_observation_tokens(m: ModuleType) -> None:
    # gamma .5, tokens at 0 and 3: G_3 = 4, G_0 = 1 + .5 * 4 = 3, not 1 + .5^3 * 4
    found = m.discounted_returns(doubles([1, 0, 0, 4]), doubles([1, 0, 0, 1]), 0.5)
    assert_close(found, doubles([3, 0, 0, 4]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="1 rewards stand outside"):
        m.discounted_returns(doubles([1, 2, 0, 4]), doubles([1, 0, 0, 1]), 0.5)


def test_refusals(m: ModuleType) -> None:
    with pytest.raises(ValueError, match="'gae': one of grpo, dr_grpo, rloo, reinforce_baseline"):
        m.group_advantages(SCORES, 3, "gae", 1e-4)
    with pytest.raises(ValueError, match="6 scores do not form groups of n = 4"):
        m.group_advantages(SCORES, 4, "rloo", 1e-4)
    with pytest.raises(ValueError, match="groups of n = 1"):
        m.group_advantages(SCORES, 1, "rloo", 1e-4)
    with pytest.raises(ValueError, match="not finite"):
        m.group_advantages(doubles(1, math.nan), 2, "rloo", 1e-4)


def test_relations_between_the_estimators() -> None:
    # rloo is n / (n - 1) times dr_grpo; grpo does not see the scale of the rewards; no group has a preference.
    torch.manual_seed(0)
    scores = torch.randn(12, dtype=torch.float64)
    by_name = {e: advantages.group_advantages(scores, 4, e, 0.0)[0] for e in advantages.GROUP_ESTIMATORS}
    assert_close(by_name["rloo"], by_name["dr_grpo"] * 4 / 3, rtol=0, atol=1e-13)
    scaled, _ = advantages.group_advantages(10 * scores + 3, 4, "grpo", 0.0)
    assert_close(scaled, by_name["grpo"], rtol=0, atol=1e-12)
    for found in by_name.values():
        assert_close(found.view(3, 4).sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-13)


def test_permuting_the_samples_of_a_group_permutes_the_advantages() -> None:
    torch.manual_seed(1)
    scores, order = torch.randn(8, dtype=torch.float64), torch.tensor([2, 0, 3, 1, 6, 7, 4, 5])
    for estimator in advantages.GROUP_ESTIMATORS:
        found, _ = advantages.group_advantages(scores, 4, estimator, 1e-4)
        again, _ = advantages.group_advantages(scores[order], 4, estimator, 1e-4)
        assert_close(again, found[order], rtol=0, atol=1e-13)
