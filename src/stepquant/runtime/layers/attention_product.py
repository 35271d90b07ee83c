"""The attention product in integers, with the ranges of its four operands as buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepquant.artifact import ProductSpec
from stepquant.runtime import ops
from stepquant.runtime.device import device_for
from stepquant.runtime.layers.stored import Stored, forget_loaded
from stepquant.runtime.ops.code import Code

PORTS = ("query", "key", "value", "probabilities")


class IntegerProduct(Stored):
    """softmax(Q K^T) V over (batch, heads, tokens, width); `reason` says why it does not multiply integers."""

    def __init__(self, spec: ProductSpec, device: torch.device, groups: int = 1) -> None:
        super().__init__()
        self.spec = spec
        self.row = 0  # of the ranges, where there is one for every step
        self.reason: str | None = "not prepared"
        self.codes: tuple[Code, ...] = ()
        for port in PORTS:
            count = groups if getattr(spec, port).granularity == "step" else 1
            self.register_buffer(f"{port}_scale", torch.ones(count, device=device))
            self.register_buffer(f"{port}_zero_point", torch.zeros(count, dtype=torch.int32, device=device))
        if spec.shifted:
            self.register_buffer("probabilities_shift", torch.zeros(1, device=device))
        self.register_load_state_dict_post_hook(forget_loaded)

    def forget(self) -> None:
        self.codes = ()

    def prepared(self) -> IntegerProduct:
        if self.codes and self.edited():
            self.codes = ()
        if not self.codes:
            self.remember()
            self.codes = tuple(self.code(port) for port in PORTS)
            self.reason = self.why_float()
        return self

    def code(self, port: str) -> Code:
        """Where an operand lands in a byte. The only reader of the ranges."""
        scale, zero_point = (
            getattr(self, f"{port}_{name}")[self.row].item() for name in ("scale", "zero_point")
        )
        return Code.of_grid(getattr(self.spec, port), scale, zero_point)

    @property
    def stepped(self) -> bool:
        """Whether the operands have a range for every step."""
        return self.spec.query.granularity == "step"

    def select(self, row: int) -> None:
        """Read this row of the ranges from now on."""
        if row != self.row:
            self.row, self.codes = row, ()

    def why_float(self) -> str | None:
        if self.codes[3].zero_point != 0:
            return "probabilities with a zero point have no integer kernel"
        device = self.get_buffer("query_scale").device
        return device_for(device).why_no_attention(device)

    def why_not(
        self, q: Tensor, _k: Tensor, _v: Tensor, mask: Tensor | None = None, *_: object
    ) -> str | None:
        """Why these operands are not multiplied as integers; None if they are."""
        if self.reason is None and mask is not None:
            return "no integer kernel takes a mask: whole numbers multiplied in float32"
        return self.reason

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        self.prepared()
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if self.why_not(q, k, v, mask) is None:
            return self.shifted(ops.attention(q, k, v, scale, *self.codes), v)
        return self.shifted(self.whole_numbers(q, k, v, mask, scale), v)

    def shifted(self, out: Tensor, v: Tensor) -> Tensor:
        """A constant that is added to every probability adds that much of the sum of all values."""
        if not self.spec.shifted:
            return out
        value = self.codes[2]
        total = centred(v, value).sum(-2, keepdim=True) * (
            value.scale * self.get_buffer("probabilities_shift")
        )
        return out + total.to(out.dtype)

    def whole_numbers(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """The same product on whole numbers in float32, which holds the sums of up to 1,000 widths exactly."""
        query, key, value, probabilities = self.codes
        left, right, values = (centred(x, code) for x, code in zip((q, k, v), self.codes))
        scores = left @ right.transpose(-1, -2)
        scores = (scores - scores.amax(-1, keepdim=True)) * (query.scale * key.scale * scale)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        out = centred(scores.softmax(-1), probabilities) @ values * (probabilities.scale * value.scale)
        return out.to(q.dtype)


def centred(x: Tensor, code: Code) -> Tensor:
    return ops.quantize(x, code).float() - code.zero_point
