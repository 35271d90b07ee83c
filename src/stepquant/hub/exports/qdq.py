"""Layers and products of an artifact in the words of ONNX: QuantizeLinear and DequantizeLinear around float operations.

The integers of weights are constants of the graph, with their scales beside them. Numbers are those of the plain-torch
runtime, but for ties: ONNX divides by the scale where the runtime multiplies by its reciprocal. Convolutions may be written
as products of integers, for engines that would sum them in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.affine import scales_of_rows
from stepquant.core.rotation import rotate
from stepquant.hub.exports.nodes import node
from stepquant.hub.exports.windows import Windows, why_not
from stepquant.models.causal import bordered
from stepquant.models.products import give_back, rebind
from stepquant.runtime.layers.attention_product import PORTS, IntegerProduct, powers_of_two
from stepquant.runtime.layers.convolution import IntegerConv2d, IntegerConv3d
from stepquant.runtime.layers.embedding import IntegerEmbedding, looked_up
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.linear import IntegerLinear
from stepquant.runtime.ops.code import Code


class Rounded(nn.Module):
    """A tensor as its codes say it: quantized, and back. There is a scale for each row of the ranges, of which one is read."""

    tables: Tensor | None  # what codes are moved to

    def __init__(self, codes: tuple[Code, ...], place: Place, tables: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("tables", torch.stack(list(tables)) if tables else None)
        self.ends = sorted({(code.low, code.high) for code in codes})
        if len(self.ends) > 1:  # bits differ by step
            self.register_buffer("low", torch.tensor([float(code.low) for code in codes]))
            self.register_buffer("high", torch.tensor([float(code.high) for code in codes]))
        self.register_buffer("scale", torch.tensor([code.scale for code in codes]))
        zero_points = torch.tensor([code.zero_point for code in codes], dtype=torch.uint8)
        self.register_buffer("zero_point", zero_points)

    def forward(self, x: Tensor) -> Tensor:
        codes, *ends = self.codes(x)
        return node("DequantizeLinear", [codes, *ends], torch.float32, x.shape)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the scale and the zero point that they have."""
        scale, zero_point = self.place.of(self.scale), self.place.of(self.zero_point)  # type: ignore[arg-type]
        x = x.float()
        if self.ends != [(0, 255)]:
            ends: Any = self.ends[0]
            if len(self.ends) > 1:
                ends = [self.place.of(self.get_buffer(name)) for name in ("low", "high")]
            ends = [(end - zero_point.float()) * scale for end in ends]
            # What becomes of `clamp` lacks a tensor where layers clip the same numbers differently (onnxscript 0.7.2).
            x = node("Clip", [x, *ends], torch.float32, x.shape)
        codes = node("QuantizeLinear", [x, scale, zero_point], torch.uint8, x.shape)
        moved = codes if self.tables is None else self.place.of(self.tables)[codes.long()]
        return moved, scale, zero_point


class Place:
    """Which row of the ranges is read: the only one, or that of the t of the call, which is found when the graph runs."""

    row: Tensor | None = None

    def of(self, values: Tensor) -> Tensor:
        if len(values) == 1 or self.row is None:
            return values[0]
        return values[self.row]


class Weight(nn.Module):
    """The integers of a weight and their scales, as the graph holds them.

    Those of a linear, and of a convolution by `windows`, lie as the product reads them, (inputs, outputs), so that engines
    find constants there.
    """

    def __init__(self, layer: IntegerLayer, windows: bool = False) -> None:
        super().__init__()
        integers, zeros = layer.rows()
        self.shape = layer.weight_shape
        outputs = self.shape[0]
        by_output = len(integers) in (1, outputs)
        self.turned = windows or (isinstance(layer, IntegerLinear) and by_output)
        if layer.fits_signed_bytes():
            codes, found = (integers - zeros).to(torch.int8), [layer.weight_scale]
        else:  # as they are stored
            least = layer.spec.weight.qmin
            codes = (integers - least).to(torch.uint8)
            found = [layer.weight_scale, (zeros.flatten() - least).to(torch.uint8)]
        if by_output:
            codes, found = codes.reshape(self.shape), [one.expand(outputs) for one in found]
        codes = codes.movedim(1, -1).flatten(1).t() if self.turned else codes
        self.codes: Tensor
        self.scale: Tensor
        # A zero point that is 0 is left out: some engines would subtract it every time.
        for name, value in zip(("codes", "scale", "zero_point"), (codes, *found)):
            self.register_buffer(name, value.contiguous())
        self.inputs = len(found) + 1
        self.offset: Tensor | None
        sides = self.codes.dim() - 1
        offset = layer.weight_offset
        if offset is not None and not self.turned:
            offset = (offset.expand(outputs) if by_output else offset).reshape(-1, *[1] * sides)
        self.register_buffer("offset", offset)

    def forward(self) -> Tensor:
        inputs = list(self.buffers())[: self.inputs]
        axis = 1 if self.turned else 0
        values = node("DequantizeLinear", inputs, torch.float32, self.codes.shape, axis=axis)
        values = values if self.offset is None else values + self.offset
        return values if self.codes.dim() != 2 or self.turned else values.reshape(self.shape)

    def integers(self) -> list[Tensor]:
        """The codes, and their zero points where these are not 0."""
        return [value for name, value in self.named_buffers() if name in ("codes", "zero_point")]


class ExportedLayer(nn.Module):
    """A layer with a static range of its inputs, or with none: float operations on dequantized numbers, or windows of codes."""

    def __init__(self, layer: Any, place: Place, windows: bool = False) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple: its tensors are none of the graph
        spec = layer.spec
        self.rotation = spec.rotation
        self.weights = Weight(layer, windows)
        self.windows = Windows(layer) if windows else None
        self.bias: Tensor | None
        # Behind a sum, channels come before places.
        sides = [1] * (len(layer.weight_shape) - 2) if windows else []
        self.register_buffer("bias", None if layer.bias is None else layer.bias.reshape(-1, *sides))
        static = spec.input is not None and not layer.dynamic
        self.rounded = Rounded(layer.input_codes(), place, layer.input_tables()) if static else None
        self.factors: Tensor | None
        self.register_buffer("factors", layer.over_channels() if spec.balanced else None)
        self.down: Tensor
        self.up: Tensor
        if spec.rank:
            self.register_buffer("down", layer.low_rank.down.float().t().contiguous())
            self.register_buffer("up", layer.low_rank.up.float().t().contiguous())
        self.rank = spec.rank

    @property
    def weight(self) -> Tensor:
        """Some models ask a layer for the dtype of its weight."""
        return self.weights.scale

    def forward(self, input: Tensor, *kept: Any, **__: object) -> Tensor:
        layer, x = self.layer[0], input.float()
        if isinstance(layer, IntegerConv3d) and layer.border is not None:
            x = bordered(x, layer.border, *kept)
        read = x if self.factors is None else x * self.factors
        y = self.product(layer, rotate(read, self.rotation) if self.rotation else read)
        return y + (x @ self.down) @ self.up if self.rank else y

    def product(self, layer: Any, x: Tensor) -> Tensor:
        if self.windows is not None and self.rounded is not None:
            codes, scale, zero = self.rounded.codes(x)
            y = self.windows(codes, zero, self.weights.scale * scale, self.weights.integers())
            return y if self.bias is None else y + self.bias
        x = x if self.rounded is None else self.rounded(x)
        weight = self.weights()
        if not self.weights.turned:
            return layer.multiply(x, weight, self.bias)  # type: ignore[no-any-return]
        y = torch.matmul(x, weight)
        return y if self.bias is None else y + self.bias


class DynamicLayer(ExportedLayer):
    """A layer whose inputs get the scale of each row as it comes: integers are summed, and scaled behind that."""

    def product(self, layer: Any, x: Tensor) -> Tensor:
        grid = layer.spec.input
        scales = scales_of_rows(x, layer.rows_from, grid.qmax)
        codes = torch.round(x * scales.reciprocal()).clamp(grid.qmin, grid.qmax)
        if not self.weights.turned or self.weights.codes.dtype != torch.int8:
            sums = layer.multiply(codes, self.unscaled(), None)
        else:
            sums = self.summed(codes.to(torch.int8))
        sums = sums * scales
        return sums if self.bias is None else sums + self.bias.reshape(layer.bias_shape(sums))

    def summed(self, codes: Tensor) -> Tensor:
        """Products of integers, with the scales of the weight."""
        if self.windows is not None:
            zero = torch.zeros((), dtype=codes.dtype)
            return self.windows(codes, zero, self.weights.scale, self.weights.integers())  # type: ignore[no-any-return]
        shape = (*codes.shape[:-1], self.weights.codes.shape[1])
        made = node("MatMulInteger", [codes, *self.weights.integers()], torch.int32, shape)
        return made.float() * self.weights.scale

    def unscaled(self) -> Tensor:
        """The weight in float, with its scales: what no integer operation of ONNX multiplies."""
        weight: Tensor = self.weights()
        return weight.t() if self.weights.turned else weight


class ExportedTable(nn.Module):
    """A table of embeddings, whose rows are looked up as bytes and dequantized behind that."""

    def __init__(self, table: IntegerEmbedding) -> None:
        super().__init__()
        ready = table.prepared()
        self.codes: Tensor
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("codes", ready.codes.contiguous())
        self.register_buffer("scale", ready.scale.contiguous())
        self.register_buffer("zero_point", ready.zero_point.float().contiguous())

    def forward(self, input: Tensor) -> Tensor:
        return looked_up(self.codes, self.scale, self.zero_point, input)


class ExportedProduct(nn.Module):
    """softmax(Q K^T) V of operands that are quantized and dequantized."""

    def __init__(self, product: IntegerProduct, place: Place) -> None:
        super().__init__()
        self.operands = nn.ModuleDict(
            {port: Rounded(product.codes_of(port), place) for port in product.spec.ranged()}
        )
        self.spec = product.spec
        self.correction: Tensor | None
        shifted = product.spec.shifted
        self.register_buffer("correction", product.get_buffer("probabilities_shift") if shifted else None)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if self.spec.dynamic:  # the format has no scales by the token
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        query, key, value = (self.operands[port](x) for port, x in zip(PORTS, (q, k, v)))
        scores = torch.matmul(query, key.transpose(-1, -2)) * scale
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        elif mask is not None:
            scores = scores + mask
        shares = scores.softmax(-1)
        if "probabilities" in self.operands:
            shares = self.operands["probabilities"](shares)
        else:
            shares = powers_of_two(shares, self.spec)
        out = torch.matmul(shares, value)
        if self.correction is not None:
            out = out + value.sum(-2, keepdim=True) * self.correction
        return out.to(q.dtype)


def by_windows(layer: IntegerLayer) -> bool:
    return isinstance(layer, IntegerConv2d) and layer.spec.input is not None and not why_not(layer)


def exported(layer: IntegerLayer, place: Place, windows: bool) -> ExportedLayer:
    return (DynamicLayer if layer.dynamic else ExportedLayer)(layer, place, windows and by_windows(layer))


def swap(model: Any, place: Place, windows: bool) -> dict[str, nn.Module]:
    """Put such modules in the places of a network's layers and products, in place."""
    made: dict[str, nn.Module] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, IntegerEmbedding):
            made[path] = ExportedTable(module)
            model.set_submodule(path, made[path])
        elif isinstance(module, IntegerLayer):
            made[path] = exported(module, place, windows)
            model.set_submodule(path, made[path])
        elif isinstance(module, IntegerProduct):
            made[path] = ExportedProduct(module, place)
            attention = model.get_submodule(path.rpartition(".")[0])
            attention.product = made[path]
            give_back(attention)
            rebind(attention, made[path], path)
    return made
