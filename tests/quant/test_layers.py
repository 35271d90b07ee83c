"""Layers with quantizers, as they are multiplied."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from stepquant.quant.layers import apply_layer


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "model in bfloat16"])
@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv3d(32, 32, (3, 1, 1), padding=(1, 0, 0)), (2, 8, 8)),
        (nn.Conv3d(32, 32, (3, 3, 3), padding=1), (2, 2, 2)),
        (nn.Conv2d(32, 32, 3, stride=2, padding=1), (2, 1)),
        (nn.Conv1d(32, 32, 3, stride=2, padding=1), (1,)),
    ],
    ids=["frames", "cube", "plane", "line"],
)
def test_kernels_longer_than_their_input_are_learnt_in_bfloat16_by_the_gradient_of_float64(
    layer: nn.Module, sizes: tuple[int, ...], autocast: bool
) -> None:
    """Rows of frames or pixels, each of which some taps never reach."""
    torch.manual_seed(0)
    x = torch.randn(4, 32, *sizes)
    weight: Tensor = torch.randn_like(layer.weight)  # type: ignore[arg-type]
    bias: Tensor = layer.bias.detach()  # type: ignore[union-attr, operator]
    want = gradient(layer, x.double(), weight.double(), bias.double(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        given = (x, weight, bias) if autocast else (x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        found = gradient(layer, *given, torch.bfloat16)
    assert torch.linalg.vector_norm(found - want) < 0.01 * torch.linalg.vector_norm(want)


def gradient(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor, returns: torch.dtype) -> Tensor:
    """Of a weighted sum of what is returned, by the weight."""
    weight = weight.clone().requires_grad_()
    y = apply_layer(layer, x, weight, bias)
    assert y.dtype == returns
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    assert weight.grad is not None
    return weight.grad.double()
