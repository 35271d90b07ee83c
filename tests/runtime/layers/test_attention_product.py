from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from stepquant.artifact import ProductSpec
from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.errors import ArtifactError
from stepquant.quant.attention import QuantProduct
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.runtime import ops
from stepquant.runtime.layers import attention_product
from stepquant.runtime.layers.attention_product import IntegerProduct, product_in_float32, with_axes

GRIDS = {port: Grid.parse("int8/tensor") for port in ("query", "key", "value")}
GRIDS["probabilities"] = Grid.parse("uint8/tensor/sym")


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(20, 20, dtype=torch.bool).tril(),
        torch.zeros(2, 1, 1, 20).index_fill(3, torch.arange(12, 20), -torch.inf).expand(2, 3, 20, 20),
        torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["causal", "of keys, repeated", "a bias of places"],
)
def test_a_mask_is_multiplied_with_in_integers_as_in_float32(mask: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(3))
    lowered = IntegerProduct(ProductSpec(**GRIDS), torch.device("cpu"))
    for port in ("query", "key", "value", "probabilities"):
        lowered.get_buffer(f"{port}_scale").fill_(1 / 255 if port == "probabilities" else 0.025)
    lowered.prepared()
    codes = lowered.codes
    want = product_in_float32(q, k, v, with_axes(mask, 20), 8**-0.5, codes, lowered.spec)
    assert (lowered.reason is None) == ops.compiled()
    # A probability that lies on the edge between two integers may go either way.
    torch.testing.assert_close(lowered(q, k, v, mask), want, atol=4e-3 * float(v.abs().max()), rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_shift_of_the_probabilities_is_the_same_in_integers(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(3))
    v = v + 1  # otherwise the sum of all values is next to nothing
    mask = torch.ones(20, 20, dtype=torch.bool).tril() if masked else None
    outs = {}
    for shift in (0.0, 0.002):
        fake = QuantProduct(
            **{port: Quantizer(grid, Site("a", "product", port)) for port, grid in GRIDS.items()}
        )
        spec = ProductSpec(**GRIDS, shifted=bool(shift))
        spec = ProductSpec.from_json(spec.to_json())
        lowered = IntegerProduct(spec, torch.device("cpu"))
        for port, x in (("query", q), ("key", k), ("value", v), ("probabilities", torch.ones(1))):
            quantizer = fake.ports()[port]
            quantizer.set_range(*scale_and_zero(x.min(), x.max(), GRIDS[port]))
            quantizer.enabled = True
            getattr(lowered, f"{port}_scale").copy_(quantizer.scale)
        if shift:
            fake.correction = torch.tensor([shift])
            lowered.probabilities_shift.fill_(shift)
        outs[shift] = fake(q, k, v, mask, None)
        # A probability that lies on the edge between two integers may go either way.
        torch.testing.assert_close(
            lowered(q, k, v, mask), outs[shift], atol=4e-3 * float(v.abs().max()), rtol=0
        )
    moved = (outs[0.002] - outs[0.0]).mean()
    assert moved > 0.02, "large beside what rounding changes"


BY_ROW = dict.fromkeys(("query", "key", "value"), Grid.parse("int8/token")) | {
    "probabilities": Grid.parse("uint8/token/sym")
}


@pytest.mark.parametrize("masked", [False, True])
def test_scales_as_they_come_give_the_same_in_slices(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool).tril() if masked else None
    spec = ProductSpec.from_json(ProductSpec(**BY_ROW).to_json())
    lowered = IntegerProduct(spec, torch.device("cpu"))
    assert not lowered.state_dict()
    whole = ops.attention_by_row.plain(q, k, v, 8**-0.5, 127, 255, mask)
    torch.testing.assert_close(lowered(q, k, v, mask), whole, atol=4e-3 * float(v.abs().max()), rtol=0)
    monkeypatch.setattr(attention_product.ops, "MOST_KEYS", 7)
    monkeypatch.setattr(attention_product, "cuts", partial(attention_product.cuts, at_once=130))
    assert torch.equal(lowered(q, k, v, mask), whole)


def test_a_part_of_the_operands_by_the_token_is_refused() -> None:
    for grids in (
        BY_ROW | {"key": GRIDS["key"]},
        GRIDS | {"probabilities": BY_ROW["probabilities"]},
        BY_ROW | {"probabilities": Grid.parse("uint8/log")},
    ):
        with pytest.raises(ArtifactError, match="a part of its operands"):
            ProductSpec.from_json(ProductSpec(**grids).to_json())
    with pytest.raises(ArtifactError, match="a part of its operands"):
        ProductSpec.from_json(ProductSpec(**BY_ROW, shifted=True).to_json())
    with pytest.raises(ArtifactError, match="cannot carry"):
        ProductSpec.from_json(ProductSpec(**BY_ROW | {"probabilities": Grid.parse("int8/token")}).to_json())
