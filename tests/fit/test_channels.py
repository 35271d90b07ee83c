"""Channels balanced by factors and by rotation, against matrices that are written out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import minmax
from stepquant.errors import CalibrationError, MethodError
from stepquant.fit.channels import Greatest, balance_channels, by_token, rotate_channels
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import packed_tensors
from stepquant.quant.layers import QuantLayer
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.quant.schemes import ENDS, TEXTS, TIMES, scheme
from stepquant.runtime.lower import integer_layer
from tests.core.test_rotation import hadamard
from tests.models.tiny import CASES

WITHOUT = (*TIMES, *TEXTS, *ENDS)


def layer_of(weight: str = "int4/channel", inputs: str = "int4/token", width: int = 64) -> QuantLayer:
    torch.manual_seed(0)
    made = [
        Quantizer(Grid.parse(text), Site("l", "q", port))
        for text, port in ((weight, "weight"), (inputs, "input"))
    ]
    return QuantLayer(nn.Linear(width, 24).requires_grad_(False), "q", *made)


def rows_of(outlier: str, width: int = 64) -> Tensor:
    """One channel is far greater than the others: always the same, or another in every token."""
    x = torch.randn(8, 16, width, generator=Generator().manual_seed(1))
    if outlier == "lasting":
        x[..., 3] *= 40
        return x
    place = torch.randint(width, (8, 16, 1), generator=Generator().manual_seed(2))
    return x.scatter(-1, place, 40 * x.gather(-1, place))


def balanced(layer: QuantLayer, x: Tensor, alpha: float = 0.3) -> None:
    seen = Greatest()
    for part in x.split(3):
        seen.add(part)
    balance_channels({"l": layer}, {"l": seen.mean("l")}, alpha)


def switched_on(layer: QuantLayer) -> QuantLayer:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    quantizer.set_range(*scale_and_zero(*minmax(layer.weight, quantizer.grid), quantizer.grid))
    quantizer.enabled = layer.input_quantizer.enabled = True
    return layer


def test_factors_are_those_of_the_equation_and_the_layer_stays_the_same() -> None:
    layer, x = layer_of(), rows_of("lasting")
    weight, exact = layer.weight.double(), layer.layer(x)
    balanced(layer, x)
    seen = torch.stack([sample.abs().max(0).values for sample in x.double()]).mean(0)
    divisors = seen**0.3 / weight.abs().max(0).values ** 0.7
    constant = layer.factors.double() * divisors
    torch.testing.assert_close(constant, constant[:1].expand(64), rtol=1e-4, atol=0)
    rotate_channels({"l": layer}, 256)
    assert layer.rotation == 64
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)
    turned = (weight / layer.factors) @ hadamard(64)
    torch.testing.assert_close(layer.weight.double(), turned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inputs", ["int4/token", "int8/token"])
@pytest.mark.parametrize("group", [0, 16, 64])
def test_what_is_simulated_is_what_runs(inputs: str, group: int) -> None:
    layer, x = layer_of(inputs=inputs), rows_of("lasting")
    whole = copy.deepcopy(layer.layer)
    balanced(layer, x)
    rotate_channels({"l": layer}, group)
    switched_on(layer)
    spec = LayerSpec(
        layer.weight_quantizer.grid, layer.input_quantizer.grid, rotation=layer.rotation, balanced=True
    )
    runs = integer_layer(whole, LayerSpec.from_json(spec.to_json()), "l")
    runs.load_state_dict(packed_tensors(layer))
    assert runs.integer
    torch.testing.assert_close(runs(x), layer(x), rtol=1e-4, atol=1e-4)
    far = (runs.total_weight(torch.float32) - whole.weight).norm() / whole.weight.norm()
    assert far < 0.2, "the way back is for inputs as they come"


def error(x: Tensor, *, balance: bool, group: int) -> float:
    layer = layer_of("int8/channel")
    exact = layer.layer(x)
    if balance:
        balanced(layer, x)
    rotate_channels({"l": layer}, group)
    return float((switched_on(layer)(x) - exact).norm() / exact.norm())


def test_factors_are_for_lasting_outliers_and_rotation_is_for_those_that_move() -> None:
    lasting, moving = rows_of("lasting"), rows_of("moving")
    assert error(lasting, balance=True, group=0) < 0.7 * error(lasting, balance=False, group=0)
    assert error(moving, balance=True, group=0) > 0.95 * error(moving, balance=False, group=0)
    assert error(moving, balance=True, group=64) < 0.7 * error(moving, balance=True, group=0)


def test_a_width_without_a_group_stays_as_it_is_and_is_named() -> None:
    layers = {str(width): layer_of(width=width) for width in (6, 12, 64)}
    before = layers["6"].layer
    assert rotate_channels(layers, 256) == ["6"]
    assert layers["6"].layer is before
    assert [layer.rotation for layer in layers.values()] == [0, 4, 64]


def test_channels_that_cannot_be_balanced_are_an_error() -> None:
    x = rows_of("lasting")
    x[0, 0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="not finite, and cannot be balanced"):
        balanced(layer_of(), x)
    with pytest.raises(MethodError, match="never ran"):
        Greatest().mean("l")


@pytest.mark.parametrize("name", ["class_transformer", "text_to_image"])
def test_linears_read_as_many_bits_by_the_token_and_all_else_is_as_before(name: str) -> None:
    model = Denoiser(CASES[name]()[0])
    plan = scheme("w4a4")
    before, after = plan.resolve(model), by_token(model, plan, WITHOUT).resolve(model)
    for (path, port), one in before.items():
        module, grid = model.model.get_submodule(path), after[path, port].grid
        if port == "input" and isinstance(module, nn.Linear) and one.grid and one.role not in WITHOUT:
            assert grid == Grid.parse(f"int{one.grid.bits}/token")
        else:
            assert grid == one.grid
    assert any(str(one.grid) == "int4/token" for one in after.values())


def test_plans_without_such_linears_are_refused() -> None:
    model = Denoiser(CASES["class_transformer"]()[0])
    in_groups = Plan("groups", tuple(
        replace(rule, grid=Grid.parse("int4/group8")) if rule.grid and rule.ports == ("weight",) else rule
        for rule in scheme("w4a8").rules
    ))  # fmt: skip
    for plan in (scheme("w4a16"), in_groups):
        with pytest.raises(MethodError, match="by the token"):
            by_token(model, plan, WITHOUT)
