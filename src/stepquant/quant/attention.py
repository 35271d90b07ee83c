"""QuantProduct: the attention product with a quantizer on each of its four operands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepquant.core.slices import Cut, Slices, cuts
from stepquant.quant.quantizer import ALL, Quantizer


class QuantProduct(nn.Module):
    """softmax(Q K^T) V over (batch, heads, tokens, width) with quantized operands.

    Probabilities that are many are never all there: they are made slice by slice, for every pass over them anew.
    """

    def __init__(self, query: Quantizer, key: Quantizer, value: Quantizer, probabilities: Quantizer) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = query, key, value, probabilities
        self.correction: Tensor | None = None  # added to the probabilities where they are quantized
        self.first = False  # those of the first key are not quantized

    def ports(self) -> dict[str, Quantizer]:
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "probabilities": self.probabilities,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
        shape = *q.shape[:-1], k.shape[-2]
        q, k = self.query(q), self.key(k)
        if mask is None and self.unseen and not torch.is_grad_enabled():
            return F.scaled_dot_product_attention(q, k, self.value(v), scale=scale)
        mask = None if mask is None else mask.expand(shape)
        parts = cuts(*shape)
        if len(parts) == 1:
            return self.weigh(self.shares(softmax(q, k, mask, scale)), self.value(v))
        v = self.value(v)
        if self.probabilities.observer is not None:

            def make() -> Iterator[Tensor]:
                with torch.no_grad():
                    yield from (softmax(*of(part, q, k, mask), scale) for part in parts)

            self.probabilities.observer(self.probabilities, Slices(make, math.prod(shape)))
        if torch.is_grad_enabled():
            return join([self.learnable(part, q, k, v, mask, scale) for part in parts], parts)
        out = torch.empty(0)
        for part in parts:
            found = self.product(part, q, k, v, mask, scale)
            out = found.new_empty(*shape[:3], v.shape[-1]) if not out.numel() else out
            out[part] = found
        return out

    @property
    def unseen(self) -> bool:
        """Whether probabilities are floats that nobody looks at, as in the float model."""
        return not self.probabilities.enabled and self.probabilities.observer is None

    def learnable(
        self, part: Cut, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """A slice whose probabilities are made again where gradients pass through them."""
        stand_in = self.probabilities.stand_in if self.probabilities.enabled else None
        again = nullcontext() if stand_in is None else stand_in.again()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), again

        return checkpoint(  # type: ignore[no-any-return]
            self.product, part, q, k, v, mask, scale, use_reentrant=False, context_fn=contexts
        )

    def product(
        self, part: Cut, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """What one slice of queries returns."""
        found = softmax(*of(part, q, k, mask), scale)
        return self.weigh(self.rounded(found, part[0], len(q)), v[part[:2]], part[0], len(q))

    def shares(self, found: Tensor) -> Tensor:
        """What becomes of probabilities that are all there, which an observer may see where they have a range."""
        return self.rounded(found) if self.first else self.probabilities(found)

    def rounded(self, found: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        if not self.first:
            return self.probabilities.rounded(found, part, total)
        others = self.probabilities.rounded(found[..., 1:], part, total)
        return torch.cat([found[..., :1], others], -1)

    def weigh(self, probabilities: Tensor, v: Tensor, part: slice = ALL, total: int | None = None) -> Tensor:
        if self.correction is not None and self.probabilities.enabled:
            shifted = probabilities + self.correction.to(probabilities.dtype)
            probabilities = self.probabilities.spared(probabilities, shifted, part, total)
        return probabilities @ v


def softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    if mask is None:
        return scores.softmax(-1)
    left = mask if mask.dtype == torch.bool else mask > -torch.inf
    scores = scores.masked_fill(~mask, -torch.inf) if left is mask else scores + mask
    # A query that may read nothing reads nothing: its probabilities are 0, where softmax would divide 0 by 0.
    return scores.softmax(-1).masked_fill(~left.any(-1, keepdim=True), 0.0)


def of(part: Cut, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The queries, keys and mask of a slice."""
    return q[part], k[part[:2]], None if mask is None else mask[part]


def join(outs: list[Tensor], parts: list[Cut]) -> Tensor:
    """The slices put together again."""
    rows: dict[tuple[int, int], list[Tensor]] = {}
    for part, out in zip(parts, outs):
        rows.setdefault((part[0].start, part[1].start), []).append(out)
    heads: dict[int, list[Tensor]] = {}
    for (sample, _), row in rows.items():
        heads.setdefault(sample, []).append(torch.cat(row, 2))
    return torch.cat([torch.cat(row, 1) for row in heads.values()])
