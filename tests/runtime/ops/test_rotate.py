"""Rows that are rotated and quantized at once: codes and scales are those of the definition, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.core.rotation import rotate
from stepquant.runtime import ops
from stepquant.runtime.ops import Code

CODE = Code(1.0, 128, 1, 255)
LAYOUTS = {
    "dense": lambda x: x,
    "every second row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "cut": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


def same(x: Tensor, group: int, code: Code = CODE, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    got = ops.rotate_quantize_rows(x, group, code, factors)
    want = ops.rotate_quantize_rows.plain(x, group, code, factors)
    for made, defined in zip(got, want):
        assert torch.equal(made, defined)
        assert (made.shape, made.stride(), made.dtype) == (defined.shape, defined.stride(), defined.dtype)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 13])
@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_bytes_of_the_specification_over_widths(group: int, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(group + groups)
    for rows in (1, 5, 37):
        x = (
            torch.randn(rows, group * groups, generator=generator)
            * 10 ** torch.linspace(-4, 4, rows)[:, None]
        )
        codes, scales = same(x.to(dtype), group)
        turned = rotate(x.to(dtype), group)
        back = (codes.float() - 128) * scales
        assert ((back - turned).abs() <= scales * 0.5001).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_the_specification_in_all_layouts(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(3, 9, 48, generator=torch.Generator().manual_seed(0)))
    same(x, 16)
    same(x.bfloat16(), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 17, 64, 100, 1152])
def test_bytes_of_the_specification_with_factors(width: int, dtype: torch.dtype) -> None:
    """A group of one number rotates nothing: codes and scales are those that two passes find."""
    generator = torch.Generator().manual_seed(width)
    factors = torch.rand(width, generator=generator) + 0.5
    for rows in (1, 3, 17):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        codes, scales = same(x, 1, CODE, factors)
        balanced = x * factors
        assert torch.equal(scales, ops.row_scales(balanced, -1, 127))
        assert torch.equal(codes, ops.quantize_rows(balanced, scales, CODE))
        same(x, 1)
        if width % 4 == 0:
            same(x, 4, CODE, factors)
            assert not torch.equal(same(x, 4, CODE, factors)[0], codes)
        for code in (Code(0.02), Code(0.01, 3, 0, 200), Code(0.03, 128, 120, 136)):
            assert torch.equal(ops.quantize(x, code, factors), ops.quantize(balanced, code))
            assert torch.equal(ops.quantize(x, code, factors), ops.quantize.plain(x, code, factors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_the_specification_with_factors_in_all_layouts(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(3, 9, 48, generator=torch.Generator().manual_seed(0)))
    factors = torch.rand(48)
    same(x, 1, CODE, factors)
    got, want = ops.quantize(x, Code(0.02), factors), ops.quantize.plain(x, Code(0.02), factors)
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


def test_rows_of_zeros_have_scale_one_and_saturation_keeps_the_limits() -> None:
    x = torch.zeros(3, 64)
    x[1] = 1e30
    x[2, 0] = 1e-42
    codes, scales = same(x, 64)
    assert scales.flatten().tolist()[::2] == [1.0, 1.0]
    assert (codes[0] == 128).all()
    assert (codes[1].int() - 128).abs().max() == 127
    x = torch.randn(5, 64)
    codes, _ = same(torch.cat([x, -x]), 16, Code(1.0, 100, 90, 110))
    assert codes.min() == 90
    assert codes.max() == 110


def test_no_rows_and_rows_that_are_not_finite() -> None:
    same(torch.randn(0, 64), 16)
    x = torch.randn(3, 64)
    x[1, 5] = torch.nan
    _, scales = ops.rotate_quantize_rows(x, 16, CODE)
    assert scales.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
@pytest.mark.parametrize(
    ("x", "group", "message"),
    [
        (torch.ones(2, 64), 8, "a power of four"),
        (torch.ones(2, 64), 0, "a power of four"),
        (torch.ones(2, 60), 16, "groups of 16"),
        (torch.ones(2, 0), 16, "groups of 16"),
        (torch.tensor(1.0), 4, "groups of 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(x: Tensor, group: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.rotate_quantize_rows(x, group, CODE)
