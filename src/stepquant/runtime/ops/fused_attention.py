"""Attention with both products in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.core.affine import scales_of_rows
from stepquant.runtime.ops.code import Code, centred, exact, single
from stepquant.runtime.ops.operation import Operation

OUT_OF_REACH = -5000.0  # a bias: no float32 holds the share of its key beside that of one without
SWALLOWING = -1e30  # a greatest bias, beside which no score of a float counts
MOST_BIAS = 2.0**29  # in steps of a score
MOST_KEYS = 65536  # as many products of a byte and a signed byte fit 32 bits


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
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(query key^T * scale + mask) value in integers, for (batch, heads, tokens, width) of any strides.

    A query or a key of bytes is codes already. The result has the dtype of `query`, or of `value` where that is codes, and
    the memory of (batch, tokens, heads, width), so that `.transpose(1, 2).flatten(2)` is a view. The probabilities' zero
    point must be 0.
    A mask (batch or 1, heads or 1, queries or 1, keys) says which keys a query reads, or what is added to their scores, in
    whole steps of these; one of at most OUT_OF_REACH leaves a key out. A query that reads none returns 0. Where all that is
    added for a query is out of reach and finite, it counts from the greatest of it.
    """
    scores = integers(query, query_code) @ integers(key, key_code).transpose(-1, -2)
    factor = single(query_code.scale) * single(key_code.scale) * single(scale)
    distance, left = distances(scores, factor, mask)
    shares = torch.softmax(distance, dim=-1)
    if left is not None:  # where nothing is left the softmax is 0 / 0
        shares = shares.masked_fill(~left, 0.0)
    products = centred(shares, probabilities_code) @ centred(value, value_code)
    result = products.float() * (single(probabilities_code.scale) * single(value_code.scale))
    return tokens_first(result, value if query.dtype == torch.uint8 else query)


@Operation
def attention_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    most: int,
    most_probability: int,
    mask: Tensor | None = None,
) -> Tensor:
    """The same with scales that are found here: of every query of a head, of the keys and of the values of a head, and of the
    probabilities of every query; the greatest magnitude becomes `most`, the greatest probability `most_probability`.

    There are at most MOST_KEYS keys.
    """
    (q, of_query), (k, of_keys), (v, of_values) = (
        by_scale(x, first, most) for x, first in ((query, -1), (key, -2), (value, -2))
    )
    distance, left = distances(q @ k.transpose(-1, -2), of_query * of_keys * single(scale), mask)
    raised = torch.exp(distance)
    if left is not None:
        raised = raised.masked_fill(~left, 0.0)
    products = exact((raised * most_probability).round()) @ v
    total = raised.sum(-1, keepdim=True)
    result = products.float() * torch.where(total > 0, of_values / (most_probability * total), 0.0)
    return tokens_first(result, query)


def distances(scores: Tensor, factor: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of integer scores, times `factor`, to the greatest that each query reads, and which keys these are; all without a mask."""
    left = mask
    if mask is not None and mask.dtype != torch.bool:
        scores, left = biased(scores, mask.float(), factor)
    if left is not None:
        scores = scores.masked_fill(~left, -2 * MOST_BIAS)
    # The distance to the row's maximum is taken on integers, where it is exact.
    distance = (scores - scores.amax(-1, keepdim=True)).float() * factor
    return distance if left is None else distance.masked_fill(~left, -torch.inf), left


def by_scale(x: Tensor, first: int, most: int) -> tuple[Tensor, Tensor]:
    """Integers, and the scales of what lies in the dimensions from `first` on."""
    scales = scales_of_rows(x, first, most)
    return exact(torch.round(x.float() * scales.reciprocal()).clamp(-most, most)), scales


def tokens_first(result: Tensor, like: Tensor) -> Tensor:
    batch, heads, tokens, width = result.shape
    return like.new_empty((batch, tokens, heads, width)).transpose(1, 2).copy_(result)


def biased(scores: Tensor, bias: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Scores with what a mask adds to them, and which of the keys it leaves."""
    top = bias.amax(-1, keepdim=True)
    far = (top <= OUT_OF_REACH) & (top > -torch.inf)
    bias = torch.where(far, bias - top, bias)
    kept = torch.where(top <= SWALLOWING, torch.zeros_like(scores), scores)
    added = (bias / step).round().clamp(-MOST_BIAS, MOST_BIAS).nan_to_num(-MOST_BIAS)
    return kept + added.to(scores.dtype), bias > OUT_OF_REACH


def integers(x: Tensor, code: Code) -> Tensor:
    """The integers that the codes of `x` stand for, or those that `x` holds."""
    return exact(x) - code.zero_point if x.dtype == torch.uint8 else centred(x, code)
