"""The layer through oneDNN against torch's own: values and all three gradients."""

import pytest
import torch
from torch import nn

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
