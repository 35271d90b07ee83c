"""Every type of blocks of GGUF against the formula of its numbers, and on our grids."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from stepquant.artifact import LayerSpec
from stepquant.hub.foreign.blocks import BLOCKS
from stepquant.hub.foreign.rows import Rows, stored
from stepquant.runtime.layers.floating import float_layer
from stepquant.runtime.lower import integer_layer
from tests.foreign.gguf_writer import KINDS, block_of

TYPES = {block.name: block for block in BLOCKS.values()}


def test_the_same_types_are_known_here() -> None:
    assert {name: (kind.number, kind.bytes) for name, kind in KINDS.items()} == {
        block.name: (number, block.bytes) for number, block in BLOCKS.items()
    }


@pytest.mark.parametrize("name", KINDS)
def test_blocks_stand_for_their_numbers_on_our_grids_too(name: str) -> None:
    """Scales of both signs and of zero, and every code."""
    rng, kind, block = random.Random(0), KINDS[name], TYPES[name]
    data, numbers, count = b"", [], 512 // kind.numbers * 4
    for index in range(count):
        codes = [rng.randrange(2**kind.bits) for _ in range(kind.numbers)]
        halves = [0.0 if index % 5 == 0 else rng.uniform(-2, 2), rng.uniform(-2, 2)][: len(kind.at)]
        scales, offsets = ([rng.randrange(2**kind.scale_bits or 1) for _ in range(16)] for _ in range(2))
        made, own = block_of(kind, codes, halves, scales, offsets)
        data, numbers = data + made, numbers + own
    want = torch.from_numpy(np.array(numbers)).reshape(4, 512)
    codes, scales, offsets = block.parts(
        torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(count, -1)
    )
    rows = Rows(block.bits, block.signed, codes, scales, offsets).reshape(4)
    assert torch.equal(rows.floats(), want)
    grid, tensors = stored(rows)
    assert str(grid).startswith(f"{'' if block.signed else 'u'}int{kind.bits}/group{block.group}")
    layer = integer_layer(
        nn.Linear(512, 4, bias=False), LayerSpec(grid, offset="weight_offset" in tensors), "a"
    )
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in layer.state_dict().items()
    }
    layer._buffers |= tensors
    assert torch.equal(float_layer(layer).weight, want)


def rows(codes: list[list[int]], scales: list[list[float]], bits: int = 8) -> Rows:
    return Rows(bits, True, torch.tensor(codes, dtype=torch.int8), torch.tensor(scales))


@pytest.mark.parametrize(
    "codes, scales, grid",
    [
        ([[1, 2, 3, -127], [4, 5, 6, 7]], [[0.5, 0.5], [0.25, 0.25]], "int8/channel"),
        ([[1, 2, 0, 0], [4, 5, 6, 7]], [[0.5, 0.0], [0.25, 0.25]], "int8/channel"),
        ([[1, 2, 3, -128], [4, 5, 6, 7]], [[0.5, 0.5], [0.25, 0.25]], "int8/channel/asym"),
        ([[1, 2, 3, 4], [4, 5, 6, 7]], [[0.5, 0.5], [0.5, 0.5]], "int8/tensor"),
        ([[1, 2, 3, 4], [4, 5, 6, 7]], [[-0.5, -0.5], [0.25, 0.25]], "int8/channel/asym"),
        ([[1, 2, 3, 4], [4, 5, 6, 7]], [[0.5, 0.25], [0.25, 0.25]], "int8/group2"),
    ],
)
def test_scales_that_a_row_or_a_tensor_shares_are_stored_once(
    codes: list[list[int]], scales: list[list[float]], grid: str
) -> None:
    given = rows(codes, scales)
    found, tensors = stored(given)
    assert str(found) == grid
    layer = integer_layer(nn.Linear(4, 2, bias=False), LayerSpec(found), "a")
    layer._buffers |= tensors
    assert torch.equal(float_layer(layer).weight, given.floats())
