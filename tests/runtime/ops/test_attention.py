"""Integer attention against its specification: identical integers wherever no probability stands at a rounding boundary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops import Code
from tests.runtime import reference

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")

PROBABILITIES = Code(1 / 255, 0, 0, 255)


def heads(batch: int, count: int, tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(batch, heads, tokens, width) as diffusers makes it: a view of (batch, tokens, heads * width)."""
    x = torch.randn(batch, tokens, count * width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.view(batch, tokens, count, width).transpose(1, 2)


def doubtful_rows(
    q: Tensor, k: Tensor, scale: float, query: Code, key: Code, probabilities: Code, mask: Tensor | None
) -> Tensor:
    """Rows in which some probability lies within 1e-5 (relative) of a rounding boundary."""
    left = reference.quantize(q, query).double() - query.zero_point
    right = reference.quantize(k, key).double() - key.zero_point
    scores = left @ right.transpose(-1, -2) * (query.scale * key.scale * scale)
    if mask is not None:
        step = query.scale * key.scale * scale
        added = (
            torch.where(mask, 0.0, -torch.inf)
            if mask.dtype == torch.bool
            else (mask.double() / step).round() * step
        )
        scores = scores + added
    scaled = torch.softmax(scores, -1).nan_to_num() / probabilities.scale
    return (((scaled - scaled.floor()) - 0.5).abs() <= 1e-5 * (1 + scaled)).any(-1)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: tuple[Code, Code, Code, Code],
    most_doubtful: float = 0.05,
    mask: Tensor | None = None,
) -> None:
    scale = q.shape[-1] ** -0.5
    got, want = ops.attention(q, k, v, scale, *codes, mask), reference.attention(q, k, v, scale, *codes, mask)
    doubtful = doubtful_rows(q, k, scale, codes[0], codes[1], codes[3], mask)
    assert got.dtype == q.dtype
    assert got.transpose(1, 2).is_contiguous()
    assert doubtful.float().mean() <= most_doubtful
    assert torch.equal(got[~doubtful], want[~doubtful])
    # One code of one probability moves the result by at most this.
    step = codes[3].scale * codes[2].scale * 255
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=step)


SIGNED, SHIFTED = Code(0.03, 128, 1, 255), Code(0.025, 97, 0, 255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 5, 8, 40, 64, 80, 130, 160, 256])
def test_widths(width: int, dtype: torch.dtype) -> None:
    q, k, v = (heads(2, 3, tokens, width, dtype, seed) for seed, tokens in ((1, 37), (2, 50), (3, 50)))
    check(q, k, v, (SHIFTED, SIGNED, SHIFTED, PROBABILITIES))


@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (1, 77), (16, 64), (17, 65), (19, 33), (64, 4), (130, 257), (5, 1030)]
)
def test_token_counts(queries: int, keys: int) -> None:
    q, k, v = (
        heads(1, 2, tokens, 40, torch.float32, seed) for seed, tokens in ((1, queries), (2, keys), (3, keys))
    )
    check(q, k, v, (SIGNED, SHIFTED, SIGNED, PROBABILITIES), most_doubtful=0.2)


@pytest.mark.parametrize("keys", [1, 63, 65, 77])
def test_keys_that_are_not_there_weigh_nothing_though_all_scores_are_alike(keys: int) -> None:
    q, k, v = (
        heads(1, 2, tokens, 40, torch.float32, seed) for seed, tokens in ((1, 5), (2, keys), (3, keys))
    )
    flat = Code(1e-5, 128, 0, 255)
    got = ops.attention(q * 1e-3, k * 1e-3, v, 40**-0.5, flat, flat, SIGNED, PROBABILITIES)
    want = reference.attention(q * 1e-3, k * 1e-3, v, 40**-0.5, flat, flat, SIGNED, PROBABILITIES)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=SIGNED.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width, keys", [(40, 37), (5, 64), (128, 70)])
def test_codes_of_queries_and_keys_are_taken_as_they_are(width: int, keys: int, dtype: torch.dtype) -> None:
    q, k, v = (heads(2, 3, tokens, width, dtype, seed) for seed, tokens in ((1, 19), (2, keys), (3, keys)))
    codes = (0.2, SHIFTED, SIGNED, SHIFTED, PROBABILITIES)
    query, key = ops.quantize(q, SHIFTED), ops.quantize(k, SIGNED)
    for mask in (None, MASKS["the first keys"](keys)):
        want = ops.attention(q, k, v, *codes, mask)
        for operands in ((query, key), (query, k), (q, key)):
            got = ops.attention(*operands, v, *codes, mask)
            assert got.dtype == dtype
            assert torch.equal(got, want)
        plain = reference.attention(q, k, v, *codes, mask)
        assert torch.equal(reference.attention(query, key, v, *codes, mask), plain)


def dropped(*shape: int) -> Tensor:
    """A mask that leaves about two of three keys."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(4)) < 0.66


MASKS = {
    "of every sample": lambda keys: dropped(2, 1, 1, keys),
    "of every head": lambda keys: dropped(2, 3, 1, keys),
    "the first keys": lambda keys: (torch.arange(keys) < keys // 2)[None, None, None],
    "everything": lambda keys: torch.ones(1, 1, 1, keys, dtype=torch.bool),
    "nothing of one sample": lambda keys: (
        dropped(2, 1, 1, keys) & torch.tensor([True, False])[:, None, None, None]
    ),
    "added": lambda keys: torch.randn(2, 1, 1, keys, generator=torch.Generator().manual_seed(5)),
    "added, far away": lambda keys: dropped(2, 3, 1, keys).float() * 10000 - 10000,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", [7, 64, 77])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_keys(name: str, keys: int, dtype: torch.dtype) -> None:
    q, k, v = (heads(2, 3, tokens, 40, dtype, seed) for seed, tokens in ((1, 19), (2, keys), (3, keys)))
    mask = MASKS[name](keys)
    check(q, k, v, (SHIFTED, SIGNED, SHIFTED, PROBABILITIES), 0.2, mask)
    if mask.dtype == torch.bool and mask.shape[:2] == (1, 1):  # the same bytes as of what is left alone
        left = mask[0, 0, 0]
        codes = (0.2, SHIFTED, SIGNED, SHIFTED, PROBABILITIES)
        alone = ops.attention(q, k[:, :, left], v[:, :, left], *codes)
        assert torch.equal(ops.attention(q, k, v, *codes, mask), alone)


def causal(queries: int, keys: int) -> Tensor:
    return torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)


def added(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


LEAST = torch.finfo(torch.float32).min
OF_QUERIES = {
    "causal": causal,
    "causal, of few keys": lambda queries, keys: causal(queries, keys).flip(2),
    "blocks": lambda queries, keys: (torch.arange(queries)[:, None] // 5 == torch.arange(keys) // 5)[None, None],
    "of every sample": lambda queries, keys: dropped(2, 1, queries, keys),
    "of every head": lambda queries, keys: dropped(2, 3, queries, keys),
    "of heads alone": lambda queries, keys: dropped(1, 3, queries, keys),
    "a view": lambda queries, keys: dropped(2, 1, keys, queries).transpose(2, 3).expand(2, 3, queries, keys),
    "nothing of some queries": lambda queries, keys: dropped(2, 1, queries, keys) & dropped(2, 1, queries, 1),
    "added": lambda queries, keys: added(1, 3, queries, keys) * 3,
    "added in bfloat16": lambda queries, keys: added(1, 3, queries, keys).bfloat16(),
    "added, and causal": lambda queries, keys: added(1, 3, queries, keys).masked_fill(~causal(queries, keys), LEAST),
    "added, far away": lambda queries, keys: dropped(2, 1, queries, keys).float() * 1e4 - 1e4,
    "added, endlessly": lambda queries, keys: torch.where(dropped(2, 1, queries, keys), 0.0, -torch.inf),
    "added, nothing of some": lambda queries, keys: torch.where(dropped(2, 1, queries, 1), added(2, 1, queries, keys), -torch.inf),
    "far away of all keys": lambda queries, keys: torch.where(dropped(1, 1, queries, 1), added(1, 1, queries, keys), -1e4),
    "the least number of all keys": lambda queries, keys: torch.where(dropped(1, 1, queries, 1), added(1, 1, queries, keys), LEAST),
}  # fmt: skip


@pytest.mark.parametrize("queries, keys", [(1, 7), (19, 33), (33, 64), (70, 77)])
@pytest.mark.parametrize("name", OF_QUERIES)
def test_masks_of_queries(name: str, queries: int, keys: int) -> None:
    mask = OF_QUERIES[name](queries, keys)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (
            heads(2, 3, tokens, 40, dtype, seed) for seed, tokens in ((1, queries), (2, keys), (3, keys))
        )
        check(q, k, v, (SHIFTED, SIGNED, SHIFTED, PROBABILITIES), 0.4, mask)
    codes = ops.quantize(q, SHIFTED), ops.quantize(k, SIGNED)
    given = (v, 0.2, SHIFTED, SIGNED, SHIFTED, PROBABILITIES, mask)
    assert torch.equal(ops.attention(*codes, *given), ops.attention(q, k, *given))


@pytest.mark.parametrize("name", OF_QUERIES)
def test_masks_mean_what_they_mean_to_torch(name: str) -> None:
    """Fine grids leave little but the mask: a query without keys, too, returns what torch returns."""
    queries, keys = 19, 33
    q, k, v = (
        heads(2, 3, tokens, 16, torch.float32, seed) for seed, tokens in ((1, queries), (2, keys), (3, keys))
    )
    mask = OF_QUERIES[name](queries, keys)
    fine = Code(3.5 / 127, 128, 0, 255)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(q, k, v), mask if mask.dtype == torch.bool else mask.float(), scale=0.25
    )
    for attend in (ops.attention, reference.attention):
        found = attend(q, k, v, 0.25, fine, fine, fine, PROBABILITIES, mask)
        assert float((found - want).norm() / want.norm()) < 0.03


@pytest.mark.parametrize("name", ["of every sample", "nothing of one sample", "added"])
def test_a_mask_of_keys_gives_the_same_bytes_as_one_that_repeats_it_for_every_query(name: str) -> None:
    q, k, v = (heads(2, 3, tokens, 40, torch.float32, seed) for seed, tokens in ((1, 19), (2, 77), (3, 77)))
    mask, codes = MASKS[name](77), (0.2, SHIFTED, SIGNED, SHIFTED, PROBABILITIES)
    repeated = mask.repeat(1, 1, 19, 1)
    assert torch.equal(ops.attention(q, k, v, *codes, repeated), ops.attention(q, k, v, *codes, mask))


def test_a_query_that_may_read_nothing_returns_nothing() -> None:
    q, k, v = (heads(1, 2, 9, 16, torch.float32, seed) for seed in (1, 2, 3))
    codes = (0.2, SIGNED, SIGNED, SIGNED, PROBABILITIES)
    for nothing in (torch.zeros(1, 1, 1, 9, dtype=torch.bool), torch.full((1, 1, 1, 9), -torch.inf)):
        assert not ops.attention(q, k, v, *codes, nothing).any()
        assert not reference.attention(q, k, v, *codes, nothing).any()


def test_what_is_added_to_all_keys_alike_changes_nothing_though_it_is_far_away() -> None:
    """As those masks are that count what is left out as -10,000, of a sample without anything left."""
    q, k, v = (heads(1, 2, 9, 16, torch.float32, seed) for seed in (1, 2, 3))
    codes = (0.2, SIGNED, SIGNED, SIGNED, PROBABILITIES)
    want = ops.attention(q, k, v, *codes)
    for shape in ((1, 1, 1, 9), (1, 1, 9, 9)):
        assert torch.equal(ops.attention(q, k, v, *codes, torch.full(shape, -1e4)), want)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    q = heads(1, 2, 9, 16, torch.float32, 1)
    for shape in ((1, 1, 8, 9), (1, 3, 9, 9), (2, 1, 1, 9), (1, 1, 9, 8), (9, 9)):
        with pytest.raises(RuntimeError, match="a mask is expected"):
            ops.attention(
                *(q, q, q, 0.2, SIGNED, SIGNED, SIGNED, PROBABILITIES), torch.ones(shape, dtype=torch.bool)
            )


@pytest.mark.parametrize("zero_points", [(0, 0, 0), (255, 255, 255), (0, 255, 128), (255, 0, 3)])
def test_zero_points_at_both_ends(zero_points: tuple[int, int, int]) -> None:
    q, k, v = (heads(2, 2, 70, 48, torch.float32, seed) for seed in (1, 2, 3))
    check(q, k, v, (*[Code(0.02, zero, 0, 255) for zero in zero_points], PROBABILITIES))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "probabilities", [Code(0.3 / 255, 0, 0, 255), Code(1 / 15, 0, 0, 15), Code(1e-4, 0, 0, 255)]
)
def test_grids_of_the_probabilities(probabilities: Code) -> None:
    q, k, v = (heads(1, 2, 90, 32, torch.float32, seed) * 2 for seed in (1, 2, 3))
    check(q, k, v, (SHIFTED, SHIFTED, SHIFTED, probabilities), most_doubtful=0.3)


def test_saturated_operands_do_not_overflow() -> None:
    q, k, v = (heads(1, 2, 80, 256, torch.float32, seed).sign() * 1e6 for seed in (1, 2, 3))
    codes = (Code(1e-3, 0, 0, 255), Code(1e-3, 255, 0, 255), Code(1.0, 128, 0, 255), PROBABILITIES)
    check(q, k, v, codes, most_doubtful=1.0)


def test_all_zero_operands_average_the_values() -> None:
    zero = torch.zeros(1, 2, 51, 40)
    value = heads(1, 2, 51, 40, torch.float32, 0)
    codes = (SIGNED, SHIFTED, SIGNED, Code(1 / 51, 0, 0, 255))
    got = ops.attention(zero, zero, value, 1.0, *codes)
    mean = (reference.quantize(value, SIGNED).double() - 128).mean(2, keepdim=True) * SIGNED.scale
    torch.testing.assert_close(got.double(), mean.expand_as(got), rtol=1e-5, atol=1e-6)


def test_other_layouts_give_the_same_bytes() -> None:
    q, k, v = (heads(2, 3, 41, 24, torch.float32, seed) for seed in (1, 2, 3))
    codes = (SIGNED, SHIFTED, SIGNED, PROBABILITIES)
    want = ops.attention(q, k, v, 0.2, *codes)
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)
    parts = [x.unflatten(-1, (3, 24)).transpose(1, 2) for x in fused.chunk(3, -1)]
    backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for layout in (parts, backwards, [x.contiguous() for x in (q, k, v)]):
        assert torch.equal(ops.attention(*layout, 0.2, *codes), want)


def test_operands_that_do_not_fit_are_refused() -> None:
    q, k = heads(1, 2, 8, 16, torch.float32, 1), heads(1, 2, 8, 24, torch.float32, 1)
    with pytest.raises(RuntimeError, match="do not fit"):
        ops.attention(q, k, k, 1.0, SIGNED, SIGNED, SIGNED, PROBABILITIES)
    with pytest.raises(RuntimeError, match="zero point 0"):
        ops.attention(q, q, q, 1.0, SIGNED, SIGNED, SIGNED, SIGNED)
