"""Queries and keys to codes: the norm of torch in float64, pairs turned as diffusers turns them, then the specification."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops import Code
from tests.runtime.ops.test_ops import CODES, DTYPES, assert_codes, numbers

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")

SHAPES = [(2, 5, 3, 16), (1, 7, 2, 128), (2, 3, 4, 72), (1, 1, 1, 2), (3, 2, 5, 10), (1, 4, 2, 144)]


def angles(batch: int, tokens: int, pairs: int) -> Tensor:
    return numbers(batch, tokens, pairs, spread=3.0, seed=2)


def exact(x: Tensor, weight: Tensor | None, across: bool, angle: Tensor | None, halves: bool) -> Tensor:
    rows = x.double().flatten(2) if across else x.double()
    y = F.rms_norm(rows, rows.shape[-1:], None if weight is None else weight.double(), 1e-6).reshape(x.shape)
    return turned(y, angle, halves)


def turned(y: Tensor, angle: Tensor | None, halves: bool) -> Tensor:
    if angle is None:
        return y.float()
    samples = []
    for sample, own in zip(y, angle.double().expand(len(y), -1, -1)):  # which take one sequence of angles
        pair = torch.cat([own, own], -1) if halves else own.repeat_interleave(2, -1)
        way = -2 if halves else -1
        samples.append(
            apply_rotary_emb(
                sample[None], (pair.cos(), pair.sin()), use_real_unbind_dim=way, sequence_dim=1
            ).double()
        )
    return torch.cat(samples).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halves", [False, True])
def test_codes_of_turned_heads(shape: tuple[int, ...], halves: bool, dtype: torch.dtype) -> None:
    batch, tokens, heads, width = shape
    # A slice of the rows of a joint product, whose mean must not be subtracted.
    x = numbers(batch, tokens, 3, heads, width, dtype=dtype)[:, :, 1] + 1.0
    for across in (False, True):
        weight = numbers(heads * width if across else width, seed=1)
        for count in {1, batch}:
            angle = angles(count, tokens, width // 2)
            given = angle.cos(), angle.sin()
            for code in CODES:
                got = ops.rms_norm_rotary_quantize(x, weight, 1e-6, across, *given, halves, code)
                assert_codes(got, exact(x, weight, across, angle, halves), code)
                got = ops.rms_norm_rotary_quantize(x, None, 1e-6, across, None, None, halves, code)
                assert_codes(got, exact(x, None, across, None, halves), code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halves", [False, True])
def test_codes_of_turned_heads_behind_a_layer_norm(
    shape: tuple[int, ...], halves: bool, dtype: torch.dtype
) -> None:
    batch, tokens, heads, width = shape
    # A slice of the rows of a joint product, whose mean must be subtracted.
    x = numbers(batch, tokens, 3, heads, width, dtype=dtype)[:, :, 1] + 1.0
    weight, bias = numbers(width, seed=1), numbers(width, seed=3)
    for affine in ((weight, bias), (weight, None), (None, None)):
        y = F.layer_norm(
            x.double(), (width,), *(None if one is None else one.double() for one in affine), 1e-5
        )
        angle = angles(batch, tokens, width // 2)
        for given, by in ((None, None), None), ((angle.cos(), angle.sin()), angle):
            for code in CODES:
                got = ops.layer_norm_rotary_quantize(x, *affine, 1e-5, *given, halves, code)
                assert_codes(got, turned(y, by, halves), code)


def test_angles_of_any_strides_give_the_same_bytes() -> None:
    x, angle, code = numbers(2, 6, 3, 32), angles(1, 6, 16), CODES[0]
    cos, sin = angle.cos(), angle.sin()
    want = ops.rms_norm_rotary_quantize(x, None, 1e-6, False, cos, sin, False, code)
    for given in (
        (cos.repeat_interleave(2, -1)[..., ::2], sin.repeat_interleave(2, -1)[..., 1::2]),
        torch.view_as_real(torch.complex(cos, sin)).unbind(-1),
        (cos.mT.contiguous().mT, sin),
        (cos.expand(2, -1, -1), sin.expand(2, -1, -1)),
    ):
        assert torch.equal(ops.rms_norm_rotary_quantize(x, None, 1e-6, False, *given, False, code), want)
    none = ops.rms_norm_rotary_quantize(x[:0], None, 1e-6, False, cos, sin, False, code)
    assert none.shape == x[:0].shape


@pytest.mark.parametrize("halves", [False, True])
def test_extremes_saturate_and_rows_of_zeros_are_zero_points(halves: bool) -> None:
    x, angle = torch.zeros(1, 4, 2, 48), angles(1, 4, 24)
    x[:, 1], x[:, 2, 0] = 3e15, -1e-20
    for code in (Code(1e-3, 128, 0, 255), Code(1e-3, 3, 1, 15)):
        got = ops.rms_norm_rotary_quantize(x, None, 1e-6, False, angle.cos(), angle.sin(), halves, code)
        want = ops.rms_norm_rotary_quantize.plain(
            x, None, 1e-6, False, angle.cos(), angle.sin(), halves, code
        )
        assert torch.equal(got, want)
        assert (got[:, 0] == code.zero_point).all()
        assert {code.low, code.high} <= set(got[:, 1].flatten().tolist())
