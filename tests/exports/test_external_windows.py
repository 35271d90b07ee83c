"""Convolutions as products of integers, in ONNX Runtime: scales are powers of two, so that every sum is exact or wrong."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.hub.exports import windows
from stepquant.hub.exports.nodes import OPSET
from stepquant.hub.exports.qdq import Place, by_windows, exported
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer

WEIGHT, CENTRED, INPUT = Grid.parse("int8/channel"), Grid.parse("uint8/channel"), Grid.parse("uint8/tensor")
SCALE, ZERO = 2.0**-4, 77  # of the inputs
CASES: dict[str, tuple[Any, Grid]] = {
    "taps": (nn.Conv2d(3, 8, 3, padding=1), WEIGHT),
    "one number": (nn.Conv2d(4, 6, 1), WEIGHT),
    "one number of four": (nn.Conv2d(4, 6, 1, stride=2, padding=1), WEIGHT),
    "strides": (nn.Conv2d(4, 6, (3, 5), stride=(2, 3), padding=(0, 2)), WEIGHT),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=(2, 3), padding=2), WEIGHT),
    "uneven": (nn.Conv2d(4, 6, 4, padding="same"), WEIGHT),
    "zero points": (nn.Conv2d(4, 6, 3, padding=1), CENTRED),
    "sound": (nn.Conv1d(4, 6, 3, padding=1, stride=2), WEIGHT),
    "video": (nn.Conv3d(2, 6, (3, 3, 2), padding=(2, 1, 0), stride=(1, 2, 1)), WEIGHT),
}


def made(layer: Any, grid: Grid, shared: str = "tensor") -> tuple[IntegerLayer, Tensor]:
    """A layer of random integers, and what it multiplies by."""
    one = integer_layer(
        layer, LayerSpec(grid, INPUT if shared == "tensor" else Grid.parse(f"int8/{shared}")), ""
    )
    integers = torch.randint(grid.qmin, grid.qmax + 1, layer.weight.shape)
    zeros = torch.randint(0, 256, (len(integers),)) if not grid.signed else torch.zeros(len(integers))
    scales = 2.0 ** torch.randint(-9, -4, (len(integers),))
    one.weight.copy_(pack(integers, grid))
    one.weight_scale.copy_(scales)
    if not grid.signed:
        one.weight_zero_point.copy_(zeros)
    one.bias.copy_(torch.randint(-9, 9, (len(integers),)) / 4)
    if shared == "tensor":
        one.input_scale.fill_(SCALE)
        one.input_zero_point.fill_(ZERO)
    sides = (-1, *[1] * (integers.dim() - 1))
    return one, (integers.double() - zeros.reshape(sides)) * scales.reshape(sides)


def test_external_sums_are_exact_in_every_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="graphs are written with onnxscript")
    runtime: Any = pytest.importorskip("onnxruntime", reason="the outside engine is onnxruntime")
    monkeypatch.setattr(windows, "BAND", 400)
    torch.manual_seed(0)
    pairs = [made(*case) for case in CASES.values()]
    inputs = [
        torch.randint(-90, 200, (2, one.in_channels, *[9] * (one.weight.dim() and len(one.stride)))) / 16
        for one, _ in pairs
    ]  # type: ignore[arg-type]

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            assert all(by_windows(one) for one, _ in pairs)
            self.layers = nn.ModuleList(exported(one, Place(), True) for one, _ in pairs)

        def forward(self, given: list[Tensor]) -> list[Tensor]:
            return [one(x) for one, x in zip(self.layers, given)]

    program: Any = torch.onnx.export(
        torch.export.export(All().eval(), (inputs,)), opset_version=OPSET, dynamo=True, verbose=False
    )
    windows.write_out(program.model)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    names = [one.name for one in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})
    kinds = [one.op_type for one in program.model.graph]
    assert "Conv" not in kinds
    assert kinds.count("MatMulInteger") > 2 * len(pairs)
    for (name, (layer, _)), (_, weight), x, got in zip(CASES.items(), pairs, inputs, found):
        codes = ((x / SCALE).round() + ZERO).clamp(0, 255)
        read = F.pad((codes - ZERO).double() * SCALE, layer._reversed_padding_repeated_twice)
        sums = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()](
            read, weight, None, layer.stride, 0, layer.dilation
        )
        bias = pairs[list(CASES).index(name)][0].bias
        want = sums + bias.reshape(1, -1, *[1] * (x.dim() - 2))  # type: ignore[union-attr]
        assert torch.equal(torch.from_numpy(got).double(), want), name


def test_what_has_no_such_rows_is_said() -> None:
    grouped, _ = made(nn.Conv2d(4, 6, 3, groups=2), WEIGHT)
    mirrored, _ = made(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), WEIGHT)
    centred, _ = made(nn.Conv2d(4, 6, 3), CENTRED, "token")
    assert [windows.why_not(one) for one in (grouped, mirrored, centred)] == [
        "2 groups",
        "reflect padding",
        "weights beyond signed bytes",
    ]
    assert not any(by_windows(one) for one in (grouped, mirrored, centred))
