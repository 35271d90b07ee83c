"""Convolutions as products of integers: the codes that an output reads lie side by side in a row, which `MatMulInteger` multiplies.

ONNX Runtime sums the products of `Conv` in float, unless its output is quantized too; those of `MatMulInteger` it sums in integers.
While torch traces a network, such a convolution is one operation of no known set; `write_out` puts those of ONNX in its place,
which torch would take three times as long to trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.hub.exports.nodes import node
from stepquant.runtime.layers.convolution import IntegerConv2d
from stepquant.runtime.layers.layer import IntegerLayer

DOMAIN = "stepquant"
BAND = 1 << 21  # bytes of rows that are made before they are multiplied, while they are near the processor
MOST_BANDS = 16  # each has operations of its own in the graph


def why_not(layer: IntegerLayer) -> str:
    """Why a convolution has no such rows; empty if it has."""
    assert isinstance(layer, IntegerConv2d)
    if layer.groups > 1:
        return f"{layer.groups} groups"
    if layer.padding_mode != "zeros":
        return f"{layer.padding_mode} padding"
    if layer.spec.weight.granularity == "group":
        return "scales for groups of inputs"
    if layer.spec.offset:
        return "offsets of weights"
    if layer.dynamic and not layer.fits_signed_bytes():
        return "weights beyond signed bytes"
    return ""


class Windows(nn.Module):
    """The sums of a convolution, each times a scale of its output."""

    def __init__(self, layer: IntegerConv2d) -> None:
        super().__init__()
        before, after = layer.sides[-2::-2], layer.sides[::-2]
        self.channels = layer.out_channels
        self.padding = [first + last for first, last in zip(before, after)]
        self.geometry = {
            "kernel": list(layer.kernel_size),
            "strides": list(layer.stride),
            "dilations": list(layer.dilation),
            "pads": [*before, *after],
        }

    def forward(self, codes: Tensor, zero: Tensor, scale: Tensor, weight: Sequence[Tensor]) -> Tensor:
        """Of `codes` (N, C, ...), among which `zero` stands for 0.

        `weight` are its codes as (taps and input channels, outputs), and their zero points if they have any.
        """
        kernel, strides, dilations = (self.geometry[name] for name in ("kernel", "strides", "dilations"))
        sizes = [
            (int(size) + more - dilation * (taps - 1) - 1) // stride + 1
            for size, more, taps, stride, dilation in zip(
                codes.shape[2:], self.padding, kernel, strides, dilations
            )
        ]
        shape = (codes.shape[0], *sizes, self.channels)
        told = {**self.geometry, "channels": codes.shape[1], "sizes": sizes}
        inputs = [codes, zero, scale, *weight]
        return node("Windows", inputs, torch.float32, shape, DOMAIN, **told).movedim(-1, 1)


def write_out(model: Any) -> None:
    """Put operations of ONNX in the places of such convolutions, in a model of onnx_ir."""
    from onnx_ir.convenience import replace_nodes_and_values

    lists = Lists(model.graph)
    for one in [one for one in model.graph if one.domain == DOMAIN]:
        made = Written(one, lists)
        out = made.sums()
        replace_nodes_and_values(model.graph, one, [one], made.tape.nodes, one.outputs, [out])
    model.opset_imports.pop(DOMAIN, None)


class Lists:
    """Lists of integers among the constants of a graph, each of them once."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.known = graph, dict[tuple[int, ...], Any]()

    def of(self, *values: int) -> Any:
        import onnx_ir

        if values not in self.known:
            tensor = onnx_ir.tensor(list(values), onnx_ir.DataType.INT64)
            name = f"list.{len(self.known)}"
            kind = onnx_ir.TensorType(onnx_ir.DataType.INT64)
            made = onnx_ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
            self.graph.register_initializer(made)
            self.known[values] = made
        return self.known[values]


class Written:
    """The operations that stand for one convolution."""

    def __init__(self, one: Any, lists: Lists) -> None:
        from onnx_ir.tape import Tape

        self.tape, self.lists = Tape(), lists
        self.codes, self.zero, self.scale, *self.weight = one.inputs
        told = {name: value.value for name, value in one.attributes.items()}
        names = "sizes", "kernel", "strides", "dilations", "pads"
        self.sizes, self.kernel, self.strides, self.dilations, self.pads = (
            list(told[name]) for name in names
        )
        self.inputs = told["channels"] * prod(self.kernel)

    def sums(self) -> Any:
        """With channels last, a band of the image after the other."""
        op, axes = self.tape.op, len(self.sizes)
        rows = op("Transpose", [self.codes], {"perm": [0, *range(2, axes + 2), 1]})
        if any(self.pads):
            before, after = self.pads[:axes], self.pads[axes:]
            rows = op("Pad", [rows, self.lists.of(0, *before, 0, 0, *after, 0), self.zero])
        for axis in range(axes - 1, 0, -1):
            rows = self.side_by_side(rows, axis, 0, self.sizes[axis])
        found = []
        for first, last in self.bands():
            read = self.side_by_side(rows, 0, first, last)
            sums = op("MatMulInteger", [read, self.weight[0], self.zero, *self.weight[1:]])
            found.append(op("Mul", [op("Cast", [sums], {"to": 1}), self.scale]))
        return found[0] if len(found) == 1 else op("Concat", found, {"axis": 1})

    def bands(self) -> list[tuple[int, int]]:
        """First and last row of the output in each; one alone where rows are no copies."""
        copied = prod(self.sizes) * self.inputs if self.moves(0) else 0
        count = max(1, min(ceil(copied / BAND), MOST_BANDS, self.sizes[0]))
        return list(pairwise(self.sizes[0] * band // count for band in range(count + 1)))

    def moves(self, axis: int) -> bool:
        """Whether an output reads anything but what lies at its own place."""
        return self.kernel[axis] > 1 or self.strides[axis] > 1

    def side_by_side(self, x: Any, axis: int, first: int, last: int) -> Any:
        """What each output of a band reads along one axis, side by side in the channels."""
        if not self.moves(axis):
            return x
        step, dilation, found = self.strides[axis], self.dilations[axis], []
        for at in range(0, self.kernel[axis] * dilation, dilation):
            ends = at + first * step, at + (last - 1) * step + 1
            cut = [self.lists.of(one) for one in (*ends, axis + 1, step)]
            found.append(self.tape.op("Slice", [x, *cut]))
        return found[0] if len(found) == 1 else self.tape.op("Concat", found, {"axis": len(self.sizes) + 1})
