"""Hand numbers for the weights. They take the module, so that test_mutations.py can hand in a broken one."""

from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from rlhfctl.algorithms import masking


@pytest.fixture(name="m")
def module() -> ModuleType:
    return masking


def test_token_mean_weighs_every_token_of_the_global_batch_alike(m: ModuleType) -> None:
    # The global batch has 8 tokens; 1 + 3 of them are here.
    found = m.token_weights(torch.tensor([1, 3]), "token", 8, 4, 10)
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor([0.125, 0.125]), rtol=0, atol=0)


def test_sequence_mean_weighs_every_sample_alike(m: ModuleType) -> None:
    # 4 samples: 1/4 each; the 3 tokens of the second share its quarter: 1/12. total_tokens plays no part.
    found = m.token_weights(torch.tensor([1, 3]), "sequence", 999, 4, 10)
    assert_close(found, torch.tensor([1 / 4, 1 / 12]), rtol=0, atol=1e-9)


def test_constant_divides_by_samples_times_longest_response(m: ModuleType) -> None:
    # 4 samples of at most 10 tokens: 1/40 whatever their length.
    found = m.token_weights(torch.tensor([1, 3]), "constant", 999, 4, 10)
    assert_close(found, torch.tensor([1 / 40, 1 / 40]), rtol=0, atol=1e-9)


def test_a_sample_without_tokens_weighs_nothing_and_divides_by_nothing(m: ModuleType) -> None:
    for loss_mean in m.LOSS_MEANS:
        found = m.token_weights(torch.tensor([0, 2]), loss_mean, 2, 2, 5)
        assert found[0] == 0
        assert torch.isfinite(found).all()
        assert found[1] > 0


def test_per_token_follows_the_order_of_the_samples(m: ModuleType) -> None:
    found = m.per_token(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([2, 0, 3]))
    assert found.tolist() == [5.0, 5.0, 7.0, 7.0, 7.0]


def test_length_mask_is_true_on_the_first_tokens(m: ModuleType) -> None:
    found = m.length_mask(torch.tensor([2, 0, 3]), 3)
    assert found.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


def test_a_reward_outside_the_mask_is_refused(m: ModuleType) -> None:
    mask = torch.tensor([[True, True, False]])
    assert m.refuse_outside(torch.tensor([[1.0, 0.0, 0.0]]), mask) is None
    for lost in (0.5, -0.5, float("nan")):
        with pytest.raises(ValueError, match="1 rewards stand outside"):
            m.refuse_outside(torch.tensor([[1.0, 0.0, lost]]), mask)


def test_refusals(m: ModuleType) -> None:
    lengths = torch.tensor([1])
    with pytest.raises(ValueError, match="'tokens': one of token, sequence, constant"):
        m.token_weights(lengths, "tokens", 1, 1, 1)
    with pytest.raises(ValueError, match="total_tokens is 0"):
        m.token_weights(lengths, "token", 0, 1, 1)
    with pytest.raises(ValueError, match="total_samples is 0"):
        m.token_weights(lengths, "sequence", 1, 0, 1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        m.token_weights(lengths, "constant", 1, 1, 0)


def test_weights_of_the_global_batch_sum_to_one() -> None:
    # Every mean is a weighted sum: token and sequence weights over all tokens of the global batch sum to 1.
    lengths = torch.tensor([1, 3, 4])
    for loss_mean in ("token", "sequence"):
        weights = masking.token_weights(lengths, loss_mean, 8, 3, 10)
        assert_close((weights * lengths).sum(), torch.tensor(1.0), rtol=0, atol=1e-6)
