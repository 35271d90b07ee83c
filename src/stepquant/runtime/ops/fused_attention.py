"""Attention with both products in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.runtime.ops.code import Code, centred, single
from stepquant.runtime.ops.operation import Operation


@Operation
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    query_code: Code,
    key_code: Code,
    value_code: Code,
    probabilities_code: Code,
) -> Tensor:
    """softmax(query key^T * scale) value in integers, for (batch, heads, tokens, width) of any strides.

    The result has the dtype of `query` and the memory of (batch, tokens, heads, width), so that
    `.transpose(1, 2).flatten(2)` is a view. The probabilities' zero point must be 0.
    """
    scores = centred(query, query_code) @ centred(key, key_code).transpose(-1, -2)
    # The distance to the row's maximum is taken on integers, where it is exact.
    distance = (scores - scores.amax(-1, keepdim=True)).float()
    factor = single(query_code.scale) * single(key_code.scale) * single(scale)
    shares = torch.softmax(distance * factor, dim=-1)
    products = centred(shares, probabilities_code) @ centred(value, value_code)
    result = products.float() * (single(probabilities_code.scale) * single(value_code.scale))
    batch, heads, tokens, width = query.shape
    return query.new_empty((batch, tokens, heads, width)).transpose(1, 2).copy_(result)
