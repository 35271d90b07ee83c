"""softmax(Q K^T) V with both products in integers; the ranges of the four operands are buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.artifact import ProductSpec
from stepquant.core.affine import fake_quantize_log
from stepquant.core.slices import cuts
from stepquant.runtime import ops
from stepquant.runtime.device import device_for
from stepquant.runtime.layers.stored import Prepared, Ranged, Versions
from stepquant.runtime.ops.code import Code

PORTS = ("query", "key", "value", "probabilities")
POWERS = "probabilities that are powers of two have no integer kernel: they are multiplied in float32"


@dataclass(frozen=True, eq=False)
class PreparedProduct(Prepared):
    """How a product computes: the codes of the four operands for each row of their ranges."""

    reason: str | None  # why it does not multiply integers
    codes: tuple[tuple[Code, ...], ...]


class IntegerProduct(Ranged[PreparedProduct]):
    """softmax(Q K^T) V over (batch, heads, tokens, width); queries and keys of bytes are codes already."""

    def __init__(self, spec: ProductSpec, device: torch.device, groups: int = 1) -> None:
        super().__init__()
        self.spec = spec
        for port in spec.ranged():
            self.register_range(port, getattr(spec, port), groups, device)
        if spec.shifted:
            self.register_buffer("probabilities_shift", torch.zeros(1, device=device))

    def prepare(self, versions: Versions) -> PreparedProduct:
        if self.spec.dynamic:
            return PreparedProduct(versions, None, ())
        ports = [self.codes_of(port) for port in PORTS]
        rows = max(map(len, ports))
        codes = tuple(zip(*(port if len(port) == rows else port * rows for port in ports)))
        return PreparedProduct(versions, self.why_float(codes), codes)

    def codes_of(self, port: str) -> tuple[Code, ...]:
        """Where an operand lands in a byte, for each row of the ranges. The only reader of these."""
        if port not in self.spec.ranged():
            return (Code.of_grid(getattr(self.spec, port), 1.0),)
        scales, zero_points = (
            self.get_buffer(f"{port}_{name}").cpu().tolist() for name in ("scale", "zero_point")
        )
        return Code.of_rows(getattr(self.spec, port), scales, zero_points)

    @property
    def codes(self) -> tuple[Code, ...]:
        return self.prepared().codes[self.row]

    @property
    def reason(self) -> str | None:
        """Why this product does not multiply integers; None if it does."""
        return "not prepared" if self.ready is None else self.ready.reason

    @property
    def stepped(self) -> bool:
        """Whether some operand has a range for every step."""
        return any(getattr(self.spec, port).granularity == "step" for port in PORTS)

    def why_float(self, codes: tuple[tuple[Code, ...], ...]) -> str | None:
        if "probabilities" not in self.spec.ranged():
            return POWERS
        if any(row[3].zero_point != 0 for row in codes):
            return "probabilities with a zero point have no integer kernel"
        device = self.get_buffer("query_scale").device
        return device_for(device).why_no_attention(device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        if self.in_floats:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in (q, k, v)):
            y = self(*(operand.detach().float() for operand in (q, k, v)), mask, scale)
            through = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
            return (through + (y - through.detach())).to(q.dtype)  # straight through the rounding
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        mask = None if mask is None else with_axes(mask, k.shape[2])
        if self.spec.dynamic:
            return by_row(q, k, v, mask, scale, self.spec)
        codes = self.codes
        if self.reason is None:
            out = ops.attention(q, k, v, scale, codes[0], codes[1], codes[2], codes[3], mask)
            return self.shifted(out, v, codes)
        return self.shifted(product_in_float32(q, k, v, mask, scale, codes, self.spec), v, codes)

    def shifted(self, out: Tensor, v: Tensor, codes: tuple[Code, ...]) -> Tensor:
        """Add what a constant that is added to every probability contributes: as much of the sum of all values."""
        if not self.spec.shifted:
            return out
        value = codes[2]
        total = centred(v, value).sum(-2, keepdim=True) * (
            value.scale * self.get_buffer("probabilities_shift")
        )
        return out + total.to(out.dtype)


def by_row(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, spec: ProductSpec) -> Tensor:
    """With scales that are found as the operands come; slice by slice where no kernel does it."""
    ends = spec.query.qmax, spec.probabilities.qmax
    if k.shape[2] <= ops.MOST_KEYS and device_for(q.device).why_no_attention(q.device) is None:
        return ops.attention_by_row(q, k, v, scale, *ends, mask)
    shape = *q.shape[:-1], k.shape[-2]
    mask = None if mask is None else mask.expand(shape)
    out = torch.empty_like(q)
    for part in cuts(*shape):
        there = None if mask is None else mask[part]
        out[part] = ops.attention_by_row.plain(q[part], k[part[:2]], v[part[:2]], scale, *ends, there)
    return out


def with_axes(mask: Tensor, keys: int) -> Tensor:
    """A mask as (batch or 1, heads or 1, queries or 1, keys)."""
    mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, -1, keys)
    return mask[:, :, :1] if mask.stride(2) == 0 else mask  # the same for every query


def product_in_float32(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    codes: tuple[Code, ...],
    spec: ProductSpec,
) -> Tensor:
    """The same product of the same codes, as float32 numbers: their sums are exact for heads of up to 1,000 channels."""
    query, key, value, probabilities = codes
    left, right, values = (centred(x, code) for x, code in zip((q, k, v), codes))
    shape = *q.shape[:-1], k.shape[-2]
    mask = None if mask is None else mask.expand(shape)
    out = values.new_empty(*q.shape[:-1], v.shape[-1])
    for part in cuts(*shape):  # so that the probabilities of many tokens are never all there
        scores = left[part] @ right[part[:2]].transpose(-1, -2)
        scores = (scores - scores.amax(-1, keepdim=True)) * (query.scale * key.scale * scale)
        if mask is not None:
            there = mask[part]
            left = there if mask.dtype == torch.bool else there > -torch.inf
            scores = scores.masked_fill(~left, -torch.inf) if left is there else scores + there
        shares = scores.softmax(-1)
        if mask is not None:  # a query that reads nothing returns 0
            shares = shares.masked_fill(~left.any(-1, keepdim=True), 0.0)
        out[part] = weights_of(shares, probabilities, spec) @ values[part[:2]]
    return (out * (probabilities.scale * value.scale)).to(v.dtype if q.dtype == torch.uint8 else q.dtype)


def weights_of(shares: Tensor, code: Code, spec: ProductSpec) -> Tensor:
    """What values are multiplied with, in units of the code's scale."""
    if "probabilities" in spec.ranged():
        return centred(shares, code)
    return powers_of_two(shares, spec)


def powers_of_two(shares: Tensor, spec: ProductSpec) -> Tensor:
    """Of the greatest of each query's; those of the first key stay as they are where the artifact says so."""
    if not spec.first:
        return fake_quantize_log(shares, spec.probabilities)
    return torch.cat([shares[..., :1], fake_quantize_log(shares[..., 1:], spec.probabilities)], -1)


def centred(x: Tensor, code: Code) -> Tensor:
    """The integers that the codes of `x` stand for, or those that `x` holds."""
    return (x if x.dtype == torch.uint8 else ops.quantize(x, code)).float() - code.zero_point
