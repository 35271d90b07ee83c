"""Multiply-accumulates beside an independent count: torch's own of float models, and closed forms of integer ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stepquant.runtime import ops
from stepquant.runtime.coverage import coverage
from stepquant.runtime.cpu.products import ConvKernel, Geometry, LinearKernel
from stepquant.runtime.macs import Work
from tests.models.tiny import CASES

# These also multiply outside of layers and attentions: in poolers of texts, Fourier features or resampling filters.
BESIDE = ("text_keys_beside_image_keys", "hunyuandit", "mochi", "stable_audio", "waveform")
OUT, IN = 20, 12  # no multiples of the vectors that weights are padded to
CODE = ops.Code(1.0, 3)


@pytest.mark.parametrize("name", CASES)
def test_float_models_multiply_as_much_as_torch_counts(name: str) -> None:
    torch.manual_seed(0)
    model, arguments, _ = CASES[name]()
    # Torch has no count of the fused attention of CPUs.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**arguments)
    with Work() as work, torch.no_grad():
        model(**arguments)
    assert 2 * work.macs.total() == counter.get_total_flops() > 0
    seen, total = (
        coverage(model, arguments).macs,
        work.macs.total(),
    )  # nothing is multiplied outside of its lines
    assert seen < total if name in BESIDE else seen == total


def counted(call: object) -> dict[str, int]:
    with Work() as work, torch.no_grad():
        call()  # type: ignore[operator]
    return {name: macs for name, macs in work.macs.items() if macs}


def test_a_transposed_convolution_spreads_every_input() -> None:
    x, weight = torch.ones(2, 6, 5, 5), torch.ones(6, 4, 3, 3)
    found = counted(lambda: F.conv_transpose2d(x, weight, stride=2))
    assert found == {"aten::convolution": 2 * 6 * 5 * 5 * 4 * 9}


@pytest.mark.parametrize("groups", [1, 4])
def test_packed_convolutions_count_what_their_groups_leave(groups: int) -> None:
    weight = torch.ones(OUT, IN // groups, 3, 3, dtype=torch.int8)
    geometry = Geometry(padding=(1, 1), groups=groups)
    kernel = ConvKernel(lambda: weight, torch.ones(OUT), None, CODE, geometry)
    codes = torch.ones(2, IN, 6, 6, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = counted(lambda: kernel.onednn(codes, torch.float32, None))
    assert found == {ConvKernel.name: 2 * 6 * 6 * OUT * (IN // groups) * 9}


def test_packed_linears_count_rows_times_weights() -> None:
    weight = torch.ones(OUT, IN, dtype=torch.int8)
    kernel = LinearKernel(lambda: weight, torch.ones(OUT), None, CODE, Geometry())
    kernel.products = [None]
    found = counted(lambda: kernel(torch.ones(7, IN, dtype=torch.uint8), torch.float32))
    assert found == {LinearKernel.name: 7 * OUT * IN}


@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
def test_own_kernels_count_no_padding() -> None:
    weight = torch.ones(OUT, IN, 3, 3, dtype=torch.int8)
    image = ops.Product.of(weight, torch.ones(OUT), None)
    codes = torch.ones(2, IN, 6, 6, dtype=torch.uint8)
    strided = counted(lambda: image.convolve(codes, CODE, torch.float32, stride=(2, 2), sides=(1,) * 4))
    assert strided == {ConvKernel.own_name: 2 * 3 * 3 * OUT * IN * 9}
    doubled = counted(lambda: image.convolve(codes, CODE, torch.float32, sides=(1,) * 4, doubled=True))
    assert doubled == {ConvKernel.own_name: 2 * 12 * 12 * OUT * IN * 9}
    rows = ops.Product.of(weight[:, :, :1, :1], torch.ones(OUT), None)
    linear = counted(lambda: rows.linear(codes[:, :, 0, 0], CODE, torch.float32))
    assert linear == {LinearKernel.own_name: 2 * OUT * IN}
    query, key = torch.ones(2, 3, 5, 16), torch.ones(2, 3, 9, 16)
    mixed = counted(lambda: ops.attention(query, key, key, 1.0, *[ops.Code(1.0, 0)] * 4))
    assert mixed == {"stepquant::attention": 2 * (2 * 3 * 5 * 9 * 16)}
