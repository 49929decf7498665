import pytest

from rlhfctl.recipe.sections import Shaping
from rlhfctl.rewards.shaping import overlong_penalty, shape


def shaped(scores: list[float | None], lengths: list[int], cut: list[bool], **keys: object):
    return shape(scores, lengths, cut, Shaping.model_validate(keys), max_new_tokens=100)


def test_nothing_asked_nothing_done() -> None:
    result = shaped([1.0, -7.5, None], [10, 100, 3], [False, True, False])
    assert result.rewards == [1.0, -7.5, None]
    assert result.metrics == {}


def test_clip() -> None:
    result = shaped([3.0, -7.5, 0.5, None], [1] * 4, [False] * 4, clip=[-1.0, 2.0])
    assert result.rewards == [2.0, -1.0, 0.5, None]
    assert result.metrics == {"reward/clipped_fraction": pytest.approx(2 / 3), "reward/clipped": 0.5}


def test_truncated_replace_comes_after_the_clip() -> None:
    result = shaped(
        [3.0, 3.0], [100, 5], [True, False], clip=[-1.0, 2.0], truncated="replace", truncated_reward=-5.0
    )
    assert result.rewards == [-5.0, 2.0]


def test_truncated_drop() -> None:
    result = shaped([3.0, 1.0], [100, 5], [True, False], truncated="drop")
    assert result.rewards == [None, 1.0]
    assert result.metrics == {"reward/dropped_fraction": 0.5}


def test_overlong_penalty_by_hand() -> None:
    """L = 100, b = 20: nothing up to 80 tokens, half at 90, all at 100."""
    assert [overlong_penalty(n, 100, 20, 0.5) for n in (1, 80, 85, 90, 100)] == [0.0, 0.0, 0.125, 0.25, 0.5]
    assert overlong_penalty(100, 100, 0, 0.5) == 0.0


def test_length_comes_last_and_is_not_clipped() -> None:
    result = shaped(
        [3.0, 3.0, None],
        [100, 90, 95],
        [True, False, False],
        clip=[-1.0, 2.0],
        truncated="replace",
        truncated_reward=-1.0,
        overlong_buffer=20,
        overlong_factor=0.5,
    )
    assert result.rewards == [-1.5, 1.75, None]
    assert result.metrics["reward/overlong_penalty"] == 0.375


def test_normalisation_comes_after_the_clip_and_before_truncation_and_length() -> None:
    """9 is cut to 3; 1 and 3 have mean 2 and deviation 1: -1 and 1. Then -5 for the cut one, and 0.5 x length / 100."""
    result = shaped(
        [1.0, 9.0, None],
        [10, 100, 3],
        [False, True, False],
        clip=[0.0, 3.0],
        normalisation="batch",
        truncated="replace",
        truncated_reward=-5.0,
        length_penalty=0.5,
    )
    assert result.rewards == [pytest.approx(-1.05), pytest.approx(-5.5), None]
    assert result.metrics["reward/clipped"] == 2.0
    assert result.metrics["reward/normalised"] == pytest.approx(0.0)
    assert result.metrics["reward/length_penalty"] == pytest.approx(0.275)
