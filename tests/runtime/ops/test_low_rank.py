"""A low-rank branch beside integers: sums of floats within their rounding, and the same bytes however rows are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops import Code

DTYPES = (torch.float32, torch.bfloat16)
SIZES = [(1, 1, 1), (3, 33, 8), (17, 66, 31), (24, 97, 32), (25, 130, 64), (1024, 72, 32), (5, 1152, 70)]
RANKS = (1, 8, 31, 32, 64)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "cut": lambda x: torch.cat([x, x], -1)[:, : x.shape[-1]],
    "turned": lambda x: x.t().contiguous().t(),
    "one row": lambda x: x[:1].expand_as(x),
}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got: Tensor, truth: Tensor, magnitude: Tensor, terms: int) -> None:
    """As near as float32 sums of so many terms are, and one rounding to the dtype."""
    assert got.shape == truth.shape
    allowed = magnitude * 2.0**-23 * terms + truth.abs() * (2.0**-8 if got.dtype == torch.bfloat16 else 0)
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "ins", "outs"), SIZES)
def test_sides_of_all_widths_are_multiplied(rows: int, ins: int, outs: int, dtype: torch.dtype) -> None:
    x, side = noise(rows, ins, dtype=dtype), noise(outs, ins, dtype=dtype)
    packed = ops.pack_side(side, dtype)
    for function in (ops.multiply_side, ops.multiply_side.plain):
        got = function(x, packed, outs)
        assert got.dtype == dtype
        close(got, x.double() @ side.double().T, x.double().abs() @ side.double().abs().T, ins)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sides_in_all_layouts_and_dtypes_of_rows(layout: str) -> None:
    x = LAYOUTS[layout](noise(9, 50))
    for dtype in DTYPES:
        packed = ops.pack_side(noise(20, 50), dtype)
        for given in (x, x.half(), x.double(), x.bfloat16()):
            want = ops.multiply_side(given.to(dtype).contiguous(), packed, 20)
            assert torch.equal(ops.multiply_side(given, packed, 20), want)
    assert ops.multiply_side(x[:0], packed, 20).shape == (0, 20)


def product(ins: int, outs: int) -> ops.Product:
    weight = torch.randint(-128, 128, (outs, ins, 1, 1), dtype=torch.int8)
    return ops.Product.of(weight, torch.rand(outs) * 1e-3, noise(outs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("rows", "ins", "outs"), [(1, 6, 1), (3, 33, 17), (17, 66, 48), (100, 40, 130)])
def test_the_epilogue_adds_sides_of_all_widths(
    rows: int, ins: int, outs: int, rank: int, dtype: torch.dtype
) -> None:
    """Products of bytes are exact, so that what the branch adds is the difference; codes and zero points at their ends."""
    torch.manual_seed(rows)
    made, up = product(ins, outs), noise(outs, rank, dtype=dtype)
    low = noise(rows, rank, dtype=dtype)
    codes = torch.randint(0, 256, (rows, ins), dtype=torch.uint8)
    codes[0] = 255
    gate, add, scales = torch.rand(1, outs), noise(rows, outs), torch.rand(rows)
    both = low, ops.pack_side(up, dtype)
    branch, magnitude = low.double() @ up.double().T, low.double().abs() @ up.double().abs().T
    for zero_point in (0, 128, 255):
        code = Code(0.5, zero_point)
        for ends in ((None, None, None), (None, None, scales), (add, gate, None), (add, None, scales)):
            got = made.linear(codes, code, torch.float32, *ends, *both)
            alone = made.linear(codes, code, torch.float32, *ends)
            more = branch if ends[1] is None else branch * gate.double()
            close(got, alone + more, magnitude + alone.abs() + add.abs(), rank + 4)
            args = (codes, code.scale, zero_point, ops.pack_weight.plain(unpacked(made, ins)), *made[1:4])
            want = ops.linear.plain(*args, torch.float32, *ends, *both)
            close(got, want.double(), magnitude + alone.abs() + add.abs(), rank + 4)
    half = made.linear(codes, code, torch.bfloat16, *ends, *both)
    assert half.dtype == torch.bfloat16


def unpacked(made: ops.Product, ins: int) -> Tensor:
    """The bytes of a packed weight, read from its products with single codes."""
    ones = torch.eye(ins, dtype=torch.uint8)
    columns = made._replace(scale=torch.ones_like(made.scale), bias=None).linear(
        ones, Code(1.0, 0), torch.float32
    )
    return columns.T.to(torch.int8)[:, :, None, None].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sides_give_a_row_the_same_bytes_whatever_its_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made, rank = product(70, 200), 32
    x, codes = noise(131, 70, dtype=dtype), torch.randint(0, 256, (131, 70), dtype=torch.uint8)
    down, up = ops.pack_side(noise(rank, 70), dtype), ops.pack_side(noise(200, rank), dtype)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        low = ops.multiply_side(x[rows], down, rank)
        return low, made.linear(codes[rows], Code(0.5, 3), torch.bfloat16, None, None, None, low, up)

    whole, threads = run(slice(None)), torch.get_num_threads()
    for first, last in ((0, 1), (5, 7), (1, 14), (30, 131), (64, 88)):
        for part, all_of_it in zip(run(slice(first, last)), whole):
            assert torch.equal(part, all_of_it[first:last])
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, run(slice(None)), whole))
    finally:
        torch.set_num_threads(threads)


def test_rows_that_are_not_finite_stay_alone() -> None:
    x = noise(9, 33, dtype=torch.bfloat16)
    x[2, 32], x[4, 0] = torch.nan, torch.inf
    low = ops.multiply_side(x, ops.pack_side(noise(7, 33).abs(), torch.bfloat16), 7)
    assert low.isnan().any(1).nonzero().flatten().tolist() == [2]
    assert low.isfinite().all(1).tolist() == [row not in (2, 4) for row in range(9)]


@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
def test_a_branch_of_other_sizes_or_dtypes_is_refused() -> None:
    made, codes = product(8, 20), torch.zeros(4, 8, dtype=torch.uint8)
    low, up = noise(4, 6), ops.pack_side(noise(20, 6), torch.float32)

    def run(low: Tensor | None, up: Tensor | None) -> Tensor:
        return made.linear(codes, Code(1.0), torch.float32, None, None, None, low, up)

    run(low, up)
    for given, message in (
        ((low, None), "factors of one branch"),
        ((low[:3], up), "low has 3 rows for 4 of codes"),
        ((low[:, :5], up), "low: rows of 6 words"),
        ((low, up[:1]), "does not fit 20 outputs"),
        ((low, up.half()), "does not fit 20 outputs"),
        ((low, up.transpose(1, 2)), "does not fit 20 outputs"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*given)
    for rows, message in ((noise(4, 7), "rows of 6 words"), (noise(6), "rows of 6 words")):
        with pytest.raises(RuntimeError, match=message):
            ops.multiply_side(rows, up, 20)
    with pytest.raises(RuntimeError, match="does not fit 40 outputs"):
        ops.multiply_side(low, up, 40)
