"""docs/scaling.md prints what the code computes, and the arithmetic agrees with sums done by hand."""

from pathlib import Path

import pytest

from benchmarks.scaling import arithmetic
from benchmarks.scaling.arithmetic import Traffic, bandwidth, efficiency, traffic


def test_the_tables_are_those_of_the_code(repo: Path) -> None:
    page = (repo / "docs/scaling.md").read_text()
    assert "\n".join(arithmetic.tables()) in page


def test_bytes_by_hand() -> None:
    """1e9 parameters on 4 ranks: three quarters of a tensor for each gather or scatter; 4 passes of a step."""
    p = 10**9
    assert traffic(p, "plain", 4) == Traffic(2 * 0.75 * p * 4, 60)
    assert traffic(p, "ZeRO-1", 4) == Traffic(0.75 * p * 6, 40)
    assert traffic(p, "ZeRO-2", 4) == Traffic(0.75 * p * 18, 100)
    assert traffic(p, "ZeRO-3", 4) == Traffic(0.75 * p * 32, 240)


def test_efficiency_by_hand() -> None:
    """8 ranks, 1e9 parameters, plain: 0.6624 s of computing, 7e9 bytes at 360 GB/s, 60 calls of 60 us."""
    assert bandwidth(8) == pytest.approx(360e9)
    assert bandwidth(16) == pytest.approx(320e9)
    compute = 8e9 * 8192 * 4 / (0.4 * 989.4e12)
    spent = compute + 7e9 / 360e9 + 60 * 60e-6
    assert efficiency(10**9, "plain", 8) == pytest.approx(compute / spent)
    assert efficiency(10**9, "ZeRO-3", 8) < efficiency(10**9, "ZeRO-2", 8) < efficiency(10**9, "ZeRO-1", 8)


def test_the_shapes_are_those_of_the_models() -> None:
    """As published: 0.49 B, 8.2 B, 72.7 B."""
    sizes = [arithmetic.parameters_of(name) / 1e9 for name in arithmetic.MODELS]
    assert sizes == pytest.approx([0.494, 8.19, 72.7], rel=0.005)
