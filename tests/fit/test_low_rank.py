"""Linears divided into integers and a branch, as they are simulated, stored and lowered."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.low_rank import nearest
from stepquant.core.ranges import lp_search, lp_search_binned, minmax
from stepquant.errors import ArtifactError, CalibrationError
from stepquant.fit.low_rank import Choice, Division, Inputs, best_division, set_range
from stepquant.quant.freeze import packed_tensors
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.runtime.layers.linear import IntegerLinear
from stepquant.runtime.lower import integer_layer

SETTINGS = Division(
    partial(lp_search, candidates=10), partial(lp_search_binned, candidates=10), rank=4, grid=4
)


def layer_of(weight: str, inputs: str | None, outputs: int = 24, width: int = 16) -> QuantLayer:
    torch.manual_seed(0)
    made = [
        text and Quantizer(Grid.parse(text), Site("l", "q", port))
        for text, port in ((weight, "weight"), (inputs, "input"))
    ]
    return QuantLayer(nn.Linear(width, outputs).requires_grad_(False), "q", *made)


def rows_of(width: int = 16) -> Tensor:
    """One channel is far greater than the others."""
    x = torch.randn(64, width, generator=Generator().manual_seed(1))
    x[:, 3] *= 30
    return x


def divided(layer: QuantLayer, x: Tensor, settings: Division = SETTINGS) -> Choice:
    seen = Inputs(1000, len(x))
    seen.add(x[:, None])
    choice = best_division(layer, seen, settings, Generator(), "l")
    layer.divide(choice.factors, choice.branch)
    set_range(layer, settings.weight_search)
    if layer.input_quantizer is not None and not layer.input_quantizer.dynamic:
        low, high = minmax(layer.received(x).reshape(1, -1), layer.input_quantizer.grid)
        layer.input_quantizer.set_range(*scale_and_zero(low, high, layer.input_quantizer.grid))
    return choice


def switch(layer: QuantLayer, on: bool) -> None:
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None:
            quantizer.enabled = on


def lowered(layer: QuantLayer, whole: nn.Linear) -> IntegerLinear:
    """Through the names and the entry that are stored."""
    inputs = layer.input_quantizer.grid if layer.input_quantizer else None
    rank = len(layer.branch.down) if layer.branch else 0
    spec = LayerSpec(layer.weight_quantizer.grid, inputs, rank=rank, balanced=layer.factors is not None)
    made = integer_layer(whole, LayerSpec.from_json(spec.to_json()), "l")
    made.load_state_dict(packed_tensors(layer))
    assert isinstance(made, IntegerLinear)
    return made


GRIDS = [
    ("int4/channel", "uint4/tensor"),
    ("int4/group8", "uint8/tensor"),
    ("int4/channel", "int8/token"),
    ("int4/channel", None),
]


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("kind", ["both", "branch", "factors"])
def test_what_is_simulated_is_what_runs(grids: tuple[str, str | None], kind: str) -> None:
    layer, x = layer_of(*grids), rows_of()
    whole, exact = copy.deepcopy(layer.layer), layer.layer(x)
    settings = replace(SETTINGS, rank=0 if kind == "factors" else 4, grid=0 if kind == "branch" else 4)
    choice = divided(layer, x, settings)
    assert (choice.branch is not None, choice.factors is not None) == (kind != "factors", kind != "branch")
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)
    switch(layer, on=True)
    runs = lowered(layer, whole)
    torch.testing.assert_close(runs(x), layer(x), rtol=1e-4, atol=1e-4)
    assert runs.integer == (grids[1] is not None and "group" not in grids[0])
    assert runs.kernel is None, "whoever fuses blocks hands it floats"
    weight = runs.total_weight(torch.float32)
    torch.testing.assert_close(
        F.linear(x, weight, runs.bias), F.linear(x, whole.weight, whole.bias), rtol=0.3, atol=4
    )
    half = runs(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - runs(x)).norm() < 0.1 * exact.norm()


def test_the_error_is_that_of_an_independent_route_and_never_above_plain_rounding() -> None:
    layer, x = layer_of("int4/channel", "uint8/tensor"), rows_of()
    weight = layer.weight.double().numpy()
    exact = x.double().numpy() @ weight.T
    plain = layer_of("int4/channel", "uint8/tensor")
    set_range(plain, SETTINGS.weight_search)
    plain.input_quantizer.set_range(
        *scale_and_zero(*minmax(x.reshape(1, -1), plain.input_quantizer.grid), plain.input_quantizer.grid)
    )
    switch(plain, on=True)
    choice = divided(layer, x, replace(SETTINGS, rounds=1, grid=0))
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    branch = (left[:, :4] * values[:4]) @ right[:4]
    np.testing.assert_allclose(choice.branch.dense().numpy(), branch, atol=2e-3)
    rest = weight - choice.branch.dense().double().numpy()
    scale = layer.weight_quantizer.scale.double().numpy()[:, None]
    codes = np.clip(np.round(rest / scale), -7, 7) * scale
    switch(layer, on=True)
    read = layer.received(x).double().numpy()
    want = (
        read @ codes.T
        + x.double().numpy() @ choice.branch.dense().double().numpy().T
        + layer.bias.double().numpy()
    )
    np.testing.assert_allclose(layer(x).numpy(), want, atol=2e-2)
    lost = float((layer(x) - layer.bias).sub(torch.from_numpy(exact)).square().mean())
    assert lost < float((plain(x) - plain.bias).sub(torch.from_numpy(exact)).square().mean())


def test_a_branch_of_full_rank_is_the_float_layer() -> None:
    layer, x = layer_of("int2/channel", None), rows_of()
    exact = layer.layer(x)
    divided(layer, x, replace(SETTINGS, rank=16))
    switch(layer, on=True)
    assert (layer(x) - exact).norm() < 2e-3 * exact.norm()


def test_a_layer_that_loses_nothing_by_rounding_stays_undivided() -> None:
    layer = layer_of("int4/channel", None)
    layer.layer.weight.copy_(torch.randint(-7, 8, (24, 16), generator=Generator().manual_seed(0)) * 0.25)
    layer.layer.weight[:, 0] = 1.75
    choice = divided(layer, rows_of())
    assert choice == Choice(0.0)
    assert layer.branch is None
    assert layer.factors is None


def test_channels_that_cannot_be_balanced_are_an_error() -> None:
    x = rows_of()
    x[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="not finite, and cannot be balanced"):
        divided(layer_of("int4/channel", "uint4/tensor"), x)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf, -1.0])
def test_stored_factors_are_finite_and_above_zero(bad: float) -> None:
    from stepquant.artifact import bounds_of
    from stepquant.core.bounds import check_values

    bounds = bounds_of({"l": LayerSpec(Grid.parse("int4/channel"), rank=4, balanced=True)}, {}, None)
    with pytest.raises(ArtifactError, match="input_factors"):
        check_values({"l.input_factors": torch.tensor([1.0, bad])}, bounds, "artifact")


def test_more_directions_than_the_layer_has_are_refused_when_it_is_loaded() -> None:
    with pytest.raises(ArtifactError, match="more directions"):
        integer_layer(nn.Linear(8, 4), LayerSpec(Grid.parse("int4/channel"), rank=5), "l")


def test_the_gradient_goes_through_both_parts() -> None:
    layer, x = layer_of("int4/channel", "uint8/tensor"), rows_of()
    whole = copy.deepcopy(layer.layer)
    divided(layer, x)
    runs, given = lowered(layer, whole), x.clone().requires_grad_()
    out = runs(given)
    out.sum().backward()
    torch.testing.assert_close(out, runs(x))
    torch.testing.assert_close(given.grad, runs.total_weight(torch.float32).sum(0).expand_as(x))


def test_nearest_for_unmultiplied_inputs_keeps_the_layer() -> None:
    layer, x = layer_of("int4/channel", None), rows_of()
    exact, factors = layer.layer(x), torch.linspace(0.5, 2, 16)
    branch, _ = nearest(layer.weight / factors, 3, Generator(), factors)
    layer.divide(factors, branch)
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)
