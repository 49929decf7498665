"""A pack's attention with its own gradient, and what stands in for it on other devices, against the plain formula."""

import pytest
import torch

from rlhfctl.models import pack_attention
from rlhfctl.models.attention import PackedLayout
from rlhfctl.models.pack_attention import Crossing
from rlhfctl.models.shared_prefix import Group, SharedLayout

HEADS, KEYS, DIM, SCALE = 4, 2, 8, 0.3
# Two rows behind a prefix of 6, three of one length behind one of 2, two documents of one length and one alone.
GROUPS = [(0, 6, [3, 7]), (16, 2, [4, 4, 4])]
ALONE = [5, 5, 9]
TOKENS = 30 + sum(ALONE)


def layout():
    return SharedLayout(
        [Group(start, prefix, rests) for start, prefix, rests in GROUPS], PackedLayout.of_lengths(ALONE, 30)
    )


def seen(window):
    """bool [T, T]: which tokens a token attends to, from each one's rows and positions."""
    rows: list[set[int]] = [set() for _ in range(TOKENS)]
    position = [0] * TOKENS
    number = 0

    def lay(tokens, first, members):
        for step, token in enumerate(tokens):
            rows[token] = set(members)
            position[token] = first + step

    for start, prefix, rests in GROUPS:
        members = range(number, number + len(rests))
        lay(range(start, start + prefix), 0, members)
        at = start + prefix
        for member, rest in zip(members, rests, strict=True):
            lay(range(at, at + rest), prefix, [member])
            at += rest
        number += len(rests)
    at = 30
    for length in ALONE:
        lay(range(at, at + length), 0, [number])
        at, number = at + length, number + 1
    allowed = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for token in range(TOKENS):
        for other in range(TOKENS):
            back = position[token] - position[other]
            shared = rows[token] <= rows[other]  # a prefix belongs to all of its rows
            allowed[token, other] = shared and 0 <= back < (window or TOKENS)
    return allowed


def inputs(dtype):
    generator = torch.Generator().manual_seed(4)
    shapes = [(1, HEADS, TOKENS, DIM), (1, KEYS, TOKENS, DIM), (1, KEYS, TOKENS, DIM)]
    found = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return found, torch.randn(shapes[0], generator=generator)


def plain(query, key, value, window):
    key, value = (x.repeat_interleave(HEADS // KEYS, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(~seen(window), -torch.inf)
    return scores.softmax(-1) @ value


# 4: most rests see the end of their prefix alone, or nothing of it; 7: the second prefix whole.
@pytest.mark.parametrize("window", [None, 7, 4, 1])
@pytest.mark.parametrize("written_out", [True, False])
def test_values_and_gradients_of_the_plain_formula(window, written_out, monkeypatch):
    if not written_out:  # what other devices run, and policy.attention: sdpa
        monkeypatch.setitem(pack_attention.chosen, "attention", "sdpa")
    ours, on = inputs(torch.float32)
    out = layout().attend(0, *ours, SCALE, window)
    (out * on).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in ours]
    expected = plain(*exact, window)
    (expected * on.double()).sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16(tiles, window, monkeypatch):
    """Gradients in float32; values too, or by the kernel's own forward, whose weights of the values are rounded."""
    monkeypatch.setattr(pack_attention, "multiplies_tiles", lambda: tiles)
    ours, on = inputs(torch.bfloat16)
    out = layout().attend(0, *ours, SCALE, window)
    assert out.dtype == torch.bfloat16
    (out * on).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in ours]
    expected = plain(*exact, window)
    (expected * on.bfloat16().double()).sum().backward()
    if tiles:
        torch.testing.assert_close(out.double(), expected, atol=8e-3, rtol=8e-3)
    else:
        assert torch.equal(out, expected.float().bfloat16())
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=2e-2 if tiles else 1e-2, rtol=5e-3)


def test_a_document_is_computed_with_what_lies_behind_it_and_sees_nothing_of_it(monkeypatch):
    """Lengths of 21, 5 and 12 pass the bfloat16 kernel as 32, 16 and, at the pack's end, 12."""
    monkeypatch.setattr(pack_attention, "multiplies_tiles", lambda: True)
    lengths, generator = [21, 5, 12], torch.Generator().manual_seed(7)
    shapes = [(1, HEADS, 38, DIM), (1, KEYS, 38, DIM), (1, KEYS, 38, DIM)]
    whole = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    assert [
        pack_attention.filled_up(run, whole[0][0, 0]) for run in [(0, 1, 21), (21, 1, 5), (26, 1, 12)]
    ] == [
        (0, 1, 32),
        (21, 1, 16),
        (26, 1, 12),
    ]
    out = PackedLayout.of_lengths(lengths).attend(0, *whole, SCALE, None)
    start = 0
    for length in lengths:
        alone = [x.detach()[:, :, start : start + length] for x in whole]
        expected = PackedLayout.of_lengths([length]).attend(0, *alone, SCALE, None)
        torch.testing.assert_close(out[:, :, start : start + length], expected, atol=8e-3, rtol=8e-3)
        start += length
    (grad,) = torch.autograd.grad(out[:, :, :21].float().sum(), whole[2])
    assert not grad[:, :, 21:].any()
    assert grad[:, :, :21].any()


def test_it_keeps_its_inputs_and_the_output_alone():
    """No copy of the keys for the rows that share them, none of one head's for another."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ours, _ = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layout().attend(0, *ours, SCALE, None)
    assert sum(kept.values()) == TOKENS * 4 * (2 * HEADS * DIM + 2 * KEYS * DIM + HEADS)


def test_a_token_that_a_window_cuts_off_from_the_prefix():
    mask = pack_attention.crossing_mask(Crossing(0, 2, [1, 3]), 3)
    assert mask is not None
    assert (mask == 0).tolist() == [[True, True], [True, True], [False, True], [False, False]]
    assert pack_attention.crossing_mask(Crossing(0, 2, [1, 3]), 5) is None
