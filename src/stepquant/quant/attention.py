"""QuantProduct: the attention product with a quantizer on each of its four operands."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepquant.quant.quantizer import Quantizer


class QuantProduct(nn.Module):
    """softmax(Q K^T) V over (batch, heads, tokens, width) with quantized operands."""

    def __init__(self, query: Quantizer, key: Quantizer, value: Quantizer, probabilities: Quantizer) -> None:
        super().__init__()
        self.query, self.key, self.value, self.probabilities = query, key, value, probabilities
        self.correction: Tensor | None = None  # added to the probabilities where they are quantized

    def ports(self) -> dict[str, Quantizer]:
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "probabilities": self.probabilities,
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        scores = self.query(q) @ self.key(k).transpose(-1, -2)
        scores = scores * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        probabilities = self.probabilities(scores.softmax(-1))
        if self.correction is not None and self.probabilities.enabled:
            probabilities = probabilities + self.correction.to(probabilities.dtype)
        return probabilities @ self.value(v)
