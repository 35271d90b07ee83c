"""RMS norms in one pass: the numbers and the dtypes of their classes."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from stepquant.models.blocks.root_norm import is_plain_root_norm, root_norm
from stepquant.runtime.blocks.root_norm import RootNormed
from tests.runtime.synthetic import noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "norm",
    [RMSNorm(24, eps=1e-6), RMSNorm(24, 1e-6, False), nn.RMSNorm(24, eps=1e-5), nn.RMSNorm(24, 1e-5, False)],
)
def test_the_output_of_the_class(norm: nn.Module, dtype: torch.dtype) -> None:
    assert is_plain_root_norm(norm)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    chain, x = RootNormed(norm, root_norm("norm", norm)), (5 * noise(2, 7, 3, 24)).to(dtype)
    with torch.no_grad():
        want, got = type(norm).forward(norm, x), chain(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5 if want.dtype == torch.float32 else 2**-6, atol=1e-6)


def test_others_are_left_to_their_class() -> None:
    assert not is_plain_root_norm(RMSNorm(24, 1e-6, bias=True))
    assert not is_plain_root_norm(nn.RMSNorm((3, 24), 1e-6))
    assert not is_plain_root_norm(nn.RMSNorm(24))
    norm = RMSNorm(24, 1e-6).bfloat16()
    chain, x = RootNormed(norm, root_norm("norm", norm)), noise(2, 24)
    with torch.no_grad():
        assert torch.equal(chain(x), type(norm).forward(norm, x))
        assert torch.equal(chain(hidden_states=x), type(norm).forward(norm, x))
