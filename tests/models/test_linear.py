"""The layer through oneDNN against torch's own: values and all three gradients."""

import pytest
import torch
from torch import nn

from rlhfctl import processor
from rlhfctl.errors import UsageError
from rlhfctl.models import linear
from rlhfctl.models.linear import OnednnLinear


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_nn_linear(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, fast = nn.Linear(8, 5, bias=bias), OnednnLinear(8, 5, bias=bias)
    fast.load_state_dict(plain.state_dict())
    weights = torch.randn(2, 7, 5, generator=generator)
    found = []
    for layer in (plain, fast):
        x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        out = layer(x)
        (out * weights).sum().backward()
        found.append([out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


INFO = "processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n"


@pytest.mark.parametrize(
    ("vendor", "family", "many_rows", "few_rows"),
    [
        ("AuthenticAMD", 26, True, True),
        ("AuthenticAMD", 25, False, True),
        ("GenuineIntel", 6, False, False),
        ("GenuineIntel", 30, False, False),
    ],
)
def test_the_library_is_the_processor_s(
    vendor: str, family: int, many_rows: bool, few_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN for many rows where AMD's units are 512 bits wide, for a rollout's few rows on all of AMD's; MKL's order
    for those on Intel's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has one library alone")
    monkeypatch.delenv("RLHFCTL_MATMUL", raising=False)
    monkeypatch.setattr(processor.Path, "read_text", lambda path: INFO.format(vendor=vendor, family=family))
    cpu = torch.device("cpu")
    for cached in (processor.description, linear.onednn_is_faster):
        cached.cache_clear()
    try:
        assert linear.onednn_is_faster() == many_rows
        assert linear.shape_bucket(torch.float32, cpu) == (64 if many_rows else 1)
        assert linear.shape_bucket(torch.bfloat16, cpu) == 128
        assert linear.shape_bucket(torch.bfloat16, torch.device("cuda")) == 1
        assert linear.onednn_decodes(torch.float32, cpu) == few_rows
        assert linear.mkl_packs(torch.float32, cpu) == (vendor == "GenuineIntel")
        assert not linear.mkl_packs(torch.bfloat16, cpu)
        assert not linear.mkl_packs(torch.float32, torch.device("cuda"))
        for choice in ("torch", "onednn", "packed"):
            monkeypatch.setenv("RLHFCTL_MATMUL", choice)
            linear.onednn_is_faster.cache_clear()
            assert (
                linear.onednn_is_faster() == linear.onednn_decodes(torch.float32, cpu) == (choice == "onednn")
            )
            assert linear.mkl_packs(torch.float32, cpu) == (choice == "packed")
        monkeypatch.setenv("RLHFCTL_MATMUL", "mkl")
        linear.onednn_is_faster.cache_clear()
        with pytest.raises(UsageError, match="RLHFCTL_MATMUL is 'mkl'"):
            linear.onednn_is_faster()
    finally:
        for cached in (processor.description, linear.onednn_is_faster):
            cached.cache_clear()


@pytest.mark.parametrize("library", ["torch", "onednn"])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added(
    library: str, into: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHFCTL_MATMUL", library)
    linear.onednn_is_faster.cache_clear()
    try:
        # Small whole numbers: exact in both dtypes.
        a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        found = torch.full((2, 4), 3.0, dtype=into)
        linear.add_product(found, a.to(dtype), b.to(dtype))
        expected = [[8.0, 17.0, 26.0, 35.0], [17.0, 53.0, 89.0, 125.0]]
        assert found.tolist() == expected
    finally:
        linear.onednn_is_faster.cache_clear()
