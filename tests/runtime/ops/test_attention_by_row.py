"""Integer attention whose operands get their scales as they come: against its specification, the fake quantization and torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.core.grid import Grid
from stepquant.quant.attention import QuantProduct
from stepquant.quant.insert import FIRST
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.runtime import ops
from tests.runtime.ops.test_attention import MASKS, OF_QUERIES, heads

SIGNED, UNSIGNED = Grid.parse("int8/token"), Grid.parse("uint8/token/sym")
ENDS = SIGNED.qmax, UNSIGNED.qmax
needs_extension = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")


def operands(queries: int, keys: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Heads and tokens of very different sizes."""
    q, k, v = (heads(2, 3, n, width, dtype, seed) for seed, n in ((1, queries), (2, keys), (3, keys)))
    of_heads = torch.tensor([0.01, 1.0, 30.0], dtype=dtype)[:, None, None]
    return q * torch.logspace(-2, 1, queries, dtype=dtype)[:, None], k * of_heads, v / of_heads


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    scale = q.shape[-1] ** -0.5
    got, want = (
        attend(q, k, v, scale, *ENDS, mask) for attend in (ops.attention_by_row, ops.attention_by_row.plain)
    )
    assert got.dtype == q.dtype
    assert got.transpose(1, 2).is_contiguous()
    # A probability beside a rounding boundary moves a result by one code of it.
    step = v.float().abs().amax((-2, -1), keepdim=True) / UNSIGNED.qmax
    gap = (got.float() - want.float()).abs()
    assert (gap <= 2 * step + 0.01 * want.float().abs()).all()
    # Exponents of scores in the hundreds are rounded at other places.
    close = gap <= 0.05 * step + want.float().abs() * (1e-4 if q.dtype == torch.float32 else 0.01)
    assert close.float().mean() > 0.98


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 5, 40, 64, 130])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(*operands(37, 50, width, dtype))


@needs_extension
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 77), (17, 65), (64, 4), (130, 257), (5, 1030)])
def test_token_counts(queries: int, keys: int) -> None:
    check(*operands(queries, keys, 40))


@needs_extension
@pytest.mark.parametrize("name", OF_QUERIES)
def test_masks_of_queries(name: str) -> None:
    check(*operands(19, 33, 16), OF_QUERIES[name](19, 33))


@needs_extension
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_keys(name: str) -> None:
    check(*operands(19, 77, 16), MASKS[name](77))


@pytest.mark.parametrize("name", OF_QUERIES)
def test_masks_mean_what_they_mean_to_torch(name: str) -> None:
    q, k, v = (heads(2, 3, n, 16, torch.float32, seed) for seed, n in ((1, 19), (2, 33), (3, 33)))
    mask = OF_QUERIES[name](19, 33)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask if mask.dtype == torch.bool else mask.float(), scale=0.25
    )
    found = ops.attention_by_row(q, k, v, 0.25, *ENDS, mask)
    assert float((found - want).norm() / want.norm()) < 0.02


def test_it_is_the_fake_quantization_of_its_grids() -> None:
    q, k, v = operands(24, 40, 16)
    grids = {"query": SIGNED, "key": SIGNED, "value": SIGNED, "probabilities": UNSIGNED}
    ports = {
        port: Quantizer(grid, Site("attention", "product", port), first=FIRST[port])
        for port, grid in grids.items()
    }
    for quantizer in ports.values():
        quantizer.enabled = True
    for mask in (None, MASKS["nothing of one sample"](40)):
        want = QuantProduct(**ports)(q, k, v, mask, 0.25)
        found = ops.attention_by_row.plain(q, k, v, 0.25, *ENDS, mask)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", [ops.attention_by_row, ops.attention_by_row.plain])
def test_flat_attention_over_many_keys_is_kept(attend: ops.Operation) -> None:
    """One range for the probabilities of all queries, up to 1, has no code for a share of one in 2,000."""
    v = heads(1, 1, 2000, 16, torch.float32, 3) + 1
    q = torch.zeros(1, 1, 4, 16)
    q[:, :, 0] = 40  # whose greatest share is 1
    found = attend(q, v, v, 0.25, *ENDS)
    torch.testing.assert_close(found[0, 0, 1:], v.mean(2)[0].expand(3, -1), rtol=1e-2, atol=1e-2)


@needs_extension
def test_what_does_not_fit_is_refused() -> None:
    q, k, v = operands(3, 5, 8)
    for given in ((q.byte(), k, v, 1.0, *ENDS), (q, k, v, 1.0, 128, 255), (q, k, v, 1.0, 127, 256)):
        with pytest.raises(RuntimeError, match="attention_by_row"):
            ops.attention_by_row(*given)
    many = torch.zeros(1, 1, ops.MOST_KEYS + 1, 1)
    with pytest.raises(RuntimeError, match="keys do not fit"):
        ops.attention_by_row(q[:1, :1, :, :1], many, many, 1.0, *ENDS)
