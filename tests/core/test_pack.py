import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.core import pack as module
from stepquant.core.affine import quantize
from stepquant.core.grid import Grid, GridError
from stepquant.core.pack import pack, pack_nearest, packed_bytes, unpack


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.booleans(), st.integers(1, 203), st.integers(0, 2**16))
def test_round_trip_and_size(bits: int, signed: bool, symmetric: bool, count: int, seed: int) -> None:
    grid = Grid(bits, signed, symmetric)
    q = torch.randint(grid.qmin, grid.qmax + 1, (count,), generator=torch.Generator().manual_seed(seed))
    data = pack(q, grid)
    assert data.dtype == torch.uint8
    assert data.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(data, grid, count).long(), q)


@pytest.mark.parametrize("bits", range(2, 9))
def test_against_one_big_integer(bits: int) -> None:
    """An independent route: the stream is the little-endian number sum(code_i * 2^(i * bits))."""
    grid = Grid(bits, signed=False, symmetric=False)
    q = torch.randint(0, grid.qmax + 1, (37,), generator=torch.Generator().manual_seed(bits))
    number = sum(int(code) << (index * bits) for index, code in enumerate(q))
    assert bytes(pack(q, grid).tolist()) == number.to_bytes(packed_bytes(37, bits), "little")


def test_a_truncated_stream_is_an_error() -> None:
    grid = Grid.parse("int4/channel")
    with pytest.raises(GridError, match="37 integers|10 integers"):
        unpack(pack(torch.zeros(10), grid)[:-1], grid, 10)


@pytest.mark.parametrize("bits", [3, 8])
def test_rows_in_slices_make_the_stream_of_all(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1)
    grid = Grid(bits, signed=True, symmetric=True)
    rows, scale, zero_point = torch.randn(21, 5), torch.rand(21) + 0.1, torch.zeros(21)
    whole = pack(quantize(rows, scale[:, None], zero_point[:, None], grid), grid)
    assert torch.equal(pack_nearest(rows, scale, zero_point, grid), whole)
