import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepquant.core.grid import Grid, GridError


@given(
    st.integers(2, 8), st.booleans(), st.booleans(), st.sampled_from(["tensor", "channel", "token", "group"])
)
def test_text_round_trip(bits: int, signed: bool, symmetric: bool, granularity: str) -> None:
    grid = Grid(bits, signed, symmetric, granularity, 32 if granularity == "group" else 0)
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    "text, low, high",
    [
        ("int8/channel", -127, 127),
        ("int8/channel/asym", -128, 127),
        ("uint8/tensor", 0, 255),
        ("int4/group32", -7, 7),
        ("uint4/tensor/sym", 0, 15),
        ("int2/tensor", -1, 1),
    ],
)
def test_limits(text: str, low: int, high: int) -> None:
    grid = Grid.parse(text)
    assert (grid.qmin, grid.qmax, grid.levels) == (low, high, high - low + 1)


def test_other_bits_keep_what_they_can() -> None:
    def at(text: str, bits: int) -> str:
        return str(Grid.parse(text).at(bits))

    assert at("int4/channel/asym", 2) == "int2/channel/asym"
    assert at("int4/channel/asym", 8) == "int8/channel"  # less a zero point it would be no signed byte
    assert at("uint8/tensor", 4) == "uint4/tensor"
    assert [at("int2/channel/codebook", bits) for bits in (3, 4, 8)] == [
        "int3/channel/codebook",
        "int4/channel/asym",
        "int8/channel",
    ]
    assert [at("uint2/tensor/codebook", bits) for bits in (3, 6, 8)] == [
        "uint3/tensor/codebook",
        "uint6/tensor/codebook",
        "uint8/tensor",
    ]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_name_integers_of_a_byte(bits: int) -> None:
    grid = Grid.parse(f"int{bits}/channel/codebook")
    assert (grid.qmin, grid.qmax, grid.levels, grid.width) == (-127, 127, 2**bits, 8)
    assert str(grid) == f"int{bits}/channel/codebook"


@pytest.mark.parametrize("text", ["uint4/tensor/codebook", "uint4/step/codebook"])
def test_codebooks_of_activations_name_bytes_of_a_range(text: str) -> None:
    grid = Grid.parse(text)
    assert (grid.qmin, grid.qmax, grid.levels, grid.width) == (0, 255, 16, 8)
    assert str(grid) == text


@pytest.mark.parametrize(
    "text",
    ["int5/channel/codebook", "uint4/channel/codebook", "int4/tensor/codebook", "uint4/token/codebook"],
)
def test_codebooks_are_for_few_bits_of_the_weights_of_channels(text: str) -> None:
    with pytest.raises(GridError, match="codebooks are for the weights of channels"):
        Grid.parse(text)


@pytest.mark.parametrize(
    "text",
    ["int9/tensor", "int1/tensor", "int8", "float8/tensor", "int8/row", "int8/group", "", "int8/group0"],
)
def test_unreadable_grids_name_the_grammar(text: str) -> None:
    with pytest.raises(GridError, match="2..8|2 to 8|group size"):
        Grid.parse(text)
