"""Layers that hold packed integers and multiply with them: what all have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.codebook import tables_of
from stepquant.core.grid import GridError
from stepquant.core.rotation import rotate
from stepquant.runtime import ops
from stepquant.runtime.kernel import Geometry, Kernel, Moves
from stepquant.runtime.layers.packed import PackedWeight
from stepquant.runtime.layers.stored import Balanced, PreparedLayer, Versions, not_needed_soon
from stepquant.runtime.ops.code import Code

WEIGHT_ONLY = "weight-only: its input is not quantized, and it multiplies floats"
DEQUANTIZED_ONCE = "weight-only: dequantized once, because it is small and often read"


class IntegerLayer(Balanced[PreparedLayer], PackedWeight[PreparedLayer]):
    """The buffers of one quantized layer and the choice of how to compute with them.

    `emit` is the dtype of the output; None means that of the input. An input of unsigned bytes is taken for codes
    that some earlier operation has made.
    """

    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    input_bits: Tensor  # of each row, where they differ
    input_codebook: Tensor  # the bytes that codes of each row may take, in order
    outputs_dim: int  # where the output channels are
    rows_from: int  # the first dimension of what shares a scale where inputs are quantized as they come

    def __init__(self, layer: nn.Module, spec: LayerSpec, groups: int = 1) -> None:
        super().__init__()
        self.make_weight(layer.weight, spec)  # type: ignore[arg-type]
        self.emit: torch.dtype | None = None
        self.float_because: str | None = None  # why it computes in float although it could multiply integers
        self.keeps_weight = False  # once dequantized, where only the weight is quantized
        self.check_rotation()
        device, outputs = self.weight.device, self.weight_shape[0]
        bias = None if layer.bias is None else torch.zeros(outputs, device=device)
        self.register_buffer("bias", bias)
        if spec.input is not None and not self.dynamic:
            self.register_range("input", spec.input, groups, device, spec.input_bits)
        self.make_factors(layer)

    def check_rotation(self) -> None:
        """Only rows can be rotated, in groups that fill them."""
        group, shape = self.spec.rotation, tuple(self.weight_shape)
        if group and (len(shape) != 2 or shape[1] % group):
            raise GridError(f"groups of {group} are rotated in linears whose inputs they divide, not {shape}")

    @property
    def code(self) -> Code:
        """Where an input number lands in a byte."""
        return self.prepared().codes[self.row]

    @property
    def kernel(self) -> Kernel | None:
        """What multiplies codes that others may make, with the present row of ranges; None if this layer reads floats."""
        kernels = () if self.alone or self.in_floats else self.prepared().kernels
        return kernels[self.row] if kernels else None

    @property
    def reason(self) -> str | None:
        """Why this layer does not multiply integers; None if it does."""
        return "not prepared" if self.ready is None else self.ready.reason

    @property
    def dynamic(self) -> bool:
        """Whether inputs are quantized with scales that are found as they come: only the layer itself can do it."""
        return self.spec.input is not None and self.spec.input.granularity == "token"

    @property
    def alone(self) -> bool:
        """Whether nobody else may make its codes, because it reads floats."""
        return self.dynamic or self.spec.balanced

    @property
    def chosen(self) -> bool:
        """Whether codes are moved to those of a codebook."""
        return self.spec.input is not None and self.spec.input.codebook

    @property
    def stepped(self) -> bool:
        """Whether the input has a range for every step."""
        return self.spec.input is not None and self.spec.input.granularity == "step"

    @property
    def integer(self) -> bool:
        """Whether this layer multiplies integers."""
        return self.prepared().reason is None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight for inputs that are not rotated."""
        stored = self.stored_weight(torch.float32 if self.spec.rotation else dtype)
        return rotate(stored, self.spec.rotation).to(dtype) if self.spec.rotation else stored

    def prepare(self, versions: Versions) -> PreparedLayer:
        reason, codes = self.why_float(), self.input_codes()
        moves = tuple(map(Moves.of, self.input_tables()))
        kernels = () if reason else self.make_kernel(codes[0]).with_codes(codes, moves)
        return PreparedLayer(versions, reason, codes, kernels, moves, {})

    def input_codes(self) -> tuple[Code, ...]:
        """One for each row of the input's ranges. The only reader of these."""
        grid = self.spec.input
        if grid is None:
            return ()
        if self.dynamic:
            return (Code.of_grid(grid, 1.0),)
        bits = self.input_bits.cpu().tolist() if self.spec.input_bits else None
        return Code.of_rows(grid, self.input_scale.cpu().tolist(), self.input_zero_point.cpu().tolist(), bits)

    def input_tables(self) -> tuple[Tensor, ...]:
        """What codes are moved to, one for each row of the input's ranges, where it has a codebook."""
        return tuple(tables_of(self.input_codebook.float()).to(torch.uint8)) if self.chosen else ()

    def stay_float(self, why: str | None) -> None:
        """Compute in float from now on, with an input that is not quantized; None: in integers again."""
        if why != self.float_because:
            self.float_because = why
            self.forget()

    def why_float(self) -> str | None:
        if self.float_because:
            return self.float_because
        if self.spec.input is None:
            return DEQUANTIZED_ONCE if self.keeps_weight else WEIGHT_ONLY
        if self.spec.weight.granularity == "group":
            return "no integer kernel sums groups of inputs with a scale each"
        if not self.fits_signed_bytes():
            return "weights minus their zero point need more than a signed byte"
        return self.why_no_kernel()

    def make_kernel(self, code: Code) -> Kernel:
        scales = self.weight_scale.expand(self.weight_shape[0]).contiguous()
        return self.kernel_type()(self.kernel_weight, scales, self.bias, code, self.geometry())

    def kernel_weight(self) -> Tensor:
        """The signed bytes in the shape that the kernel takes, which keeps them in its own order."""
        weight = self.signed_bytes()
        not_needed_soon(self.weight)
        return weight

    def geometry(self) -> Geometry:
        return Geometry()

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:
        """`input` is what torch calls it, and some models name it."""
        x, kernel = input, self.kernel
        if self.in_floats:
            return self.as_float(x)
        if x.requires_grad and torch.is_grad_enabled():
            return self.straight_through(x)
        if x.dtype == torch.uint8:
            return self.from_codes(x, self.emit or torch.float32)
        dtype = self.emit or x.dtype
        if kernel is None:
            return self.of_floats(x, dtype)
        return self.from_codes(ops.quantize(x, kernel.code), dtype)

    def of_floats(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The output where nobody else may make codes."""
        if not self.prepared().kernels:
            return self.float_forward(self.balanced(x), dtype)
        codes, scales = self.balanced_codes(x)
        return self.from_codes(codes, dtype, row_scale=scales)

    def balanced_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of an input that no factors have met yet."""
        return self.codes_of(self.balanced(x))

    def codes_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """And the scales of the rows, where these are found as they come."""
        return self.codes_of_rows(x) if self.dynamic else (ops.quantize(x, self.code), None)

    def codes_of_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """And the scales of the rows."""
        assert self.spec.input is not None
        if self.spec.rotation:
            return ops.rotate_quantize_rows(x, self.spec.rotation, self.code)
        scales = ops.row_scales(x, self.rows_from, self.spec.input.qmax)
        return ops.quantize_rows(x, scales, self.code), scales

    def as_float(self, x: Tensor) -> Tensor:
        """What the float layer that the integers stand for makes of `x`; its weight is not kept."""
        return self.multiply(self.balanced(x).to(x.dtype), self.dequantized(x.dtype), self.bias_like(x))

    def straight_through(self, x: Tensor) -> Tensor:
        """What integers make of `x`, with the gradient of the float layer that they stand for."""
        y = self(x.detach().float())
        through = self.multiply(x, self.total_weight(x.dtype), self.bias_like(x))
        return (through + (y - through.detach())).to(self.emit or x.dtype)

    def kernel_for_codes(self) -> Kernel:
        """The kernel whose code whoever made the codes was told; buffers are not looked at again in between."""
        ready = self.ready or self.prepared()
        assert ready.kernels, ready.reason
        return ready.kernels[self.row]

    def float_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The same numbers without an integer kernel; the codes of the input are small integers, exact in bfloat16."""
        if self.spec.input is None or self.float_because:
            return self.multiply(x, self.float_weight(x.dtype), self.bias_like(x)).to(dtype)
        code, (codes, scales) = self.code, self.codes_of(x)
        if self.chosen:
            codes = ops.move_codes(codes, self.prepared().moves[self.row].table)
        centred = (codes.to(torch.int16) - code.zero_point).to(x.dtype)
        weight = self.stored_weight(x.dtype) if self.spec.rotation else self.float_weight(x.dtype)
        out = self.multiply(centred, weight, None).float() * (code.scale if scales is None else scales)
        return (out if self.bias is None else out + self.bias.reshape(self.bias_shape(out))).to(dtype)

    def float_weight(self, dtype: torch.dtype) -> Tensor:
        if not self.keeps_weight and not self.float_because:
            return self.dequantized(dtype)
        weights = self.prepared().weights
        if dtype not in weights:
            weights[dtype] = self.dequantized(dtype)
        return weights[dtype]

    def bias_like(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def bias_shape(self, out: Tensor) -> list[int]:
        shape = [1] * out.dim()
        shape[self.outputs_dim] = -1
        return shape

    @abstractmethod
    def kernel_type(self) -> type[Kernel]:
        """Of the device that holds the weight."""

    @abstractmethod
    def why_no_kernel(self) -> str | None:
        """What stands in the way of integers on that device."""

    @abstractmethod
    def from_codes(
        self,
        codes: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """The output for codes of the input, of which each row, or image, may have a scale of its own; with `into`, added to
        that tensor, which may be consumed."""

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def extra_repr(self) -> str:
        inputs = f", input {self.spec.input}" if self.spec.input else ""
        rotated = f", rotated by {self.spec.rotation}" if self.spec.rotation else ""
        return f"{tuple(self.weight_shape)}, weight {self.spec.weight}{inputs}{rotated}"
