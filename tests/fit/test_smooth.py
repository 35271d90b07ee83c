"""Channels divided by what the embedding of the step makes of them, or by what their weights leave room for."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import scale_and_zero, to_groups
from stepquant.core.grid import Grid, GridError
from stepquant.core.ranges import minmax
from stepquant.errors import CalibrationError
from stepquant.fit.dilate import dilate, dilation
from stepquant.fit.noised_again import NoisedAgain, kept_of
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.smooth import divide_channels, mean_sizes
from stepquant.models.blocks.scaled import scaled_channels
from stepquant.models.denoiser import Denoiser
from stepquant.models.hooks import removing
from stepquant.progress import Silent
from stepquant.quant.freeze import packed_tensors
from stepquant.quant.insert import insert
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import integer_layer
from tests.conftest import make_one_level
from tests.models.tiny import CASES

LAYERS = {"linear": lambda: nn.Linear(6, 5), "1d": lambda: nn.Conv1d(6, 5, 3, padding=1)}
LAYERS |= {"2d": lambda: nn.Conv2d(6, 5, 3, padding=1, stride=2), "3d": lambda: nn.Conv3d(6, 5, 3, padding=1)}
SHAPES = {"linear": (4, 6), "1d": (2, 6, 7), "2d": (2, 6, 5, 5), "3d": (2, 6, 3, 5, 5)}


def layer_of(kind: str, weight: str = "int4/channel") -> tuple[QuantLayer, Tensor]:
    torch.manual_seed(0)
    made = [
        Quantizer(Grid.parse(grid), Site("l", "conv", port))
        for grid, port in ((weight, "weight"), ("uint8/tensor", "input"))
    ]
    layer = QuantLayer(LAYERS[kind]().requires_grad_(False), "conv", *made)
    set_ranges(layer, layer.layer.weight)
    return layer, torch.randn(SHAPES[kind])


def set_ranges(layer: QuantLayer, weight: Tensor) -> None:
    grid = layer.weight_quantizer.grid
    layer.weight_quantizer.set_range(*scale_and_zero(*minmax(to_groups(weight, grid), grid), grid))


@pytest.mark.parametrize("kind", LAYERS)
def test_divided_layers_are_the_same_in_float_and_run_as_they_are_simulated(kind: str) -> None:
    layer, x = layer_of(kind)
    former, exact = copy.deepcopy(layer.layer), layer.layer(x)
    assert divide_channels({"l": layer}, {"l": torch.rand(6) * 3 + 1, "other": torch.ones(2)}) == ["l"]
    torch.testing.assert_close(layer(x), exact)
    set_ranges(layer, layer.weight)
    low, high = layer.received(x).aminmax()
    layer.input_quantizer.set_range(*scale_and_zero(low[None], high[None], layer.input_quantizer.grid))
    layer.weight_quantizer.enabled = layer.input_quantizer.enabled = True
    spec = LayerSpec(layer.weight_quantizer.grid, layer.input_quantizer.grid, balanced=True)
    runs = integer_layer(former, LayerSpec.from_json(spec.to_json()), "l")
    runs.load_state_dict(packed_tensors(layer))
    assert runs.integer
    torch.testing.assert_close(runs(x), layer(x), rtol=1e-4, atol=1e-5)
    assert (runs.total_weight(torch.float32) - former.weight).norm() < 0.2 * former.weight.norm()
    runs.stay_float("asked")
    torch.testing.assert_close(runs(x), runs.multiply(x, runs.total_weight(torch.float32), runs.bias))


def test_channels_that_outputs_share_out_cannot_have_factors() -> None:
    spec = LayerSpec(Grid.parse("int4/channel"), Grid.parse("uint8/tensor"), balanced=True)
    with pytest.raises(GridError, match="groups read their own"):
        type(integer_layer(LAYERS["2d"](), spec, "l"))(nn.Conv2d(4, 4, 3, groups=4), spec)
    layer, _ = layer_of("linear")
    with pytest.raises(CalibrationError, match="not finite"):
        divide_channels({"l": layer}, {"l": torch.full((6,), torch.nan)})


@pytest.mark.parametrize("name", ["class_transformer", "flux", "sd3_dual", "class_scale_shift"])
def test_readers_read_what_the_embedding_scales(name: str) -> None:
    """Where it scales by 0, what they read no longer depends on the state."""
    torch.manual_seed(0)
    model, given, _ = CASES[name]()
    denoiser, found = Denoiser(model), scaled_channels(model)
    assert len(found) > 2
    for one in found:

        def flat(_m: nn.Module, _a: object, out: Tensor, one=one) -> Tensor:
            parts = list(out.chunk(one.parts, -1))
            parts[one.part] = torch.full_like(parts[one.part], -1.0)
            return torch.cat(parts, -1)

        seen: list[Tensor] = []
        reader = model.get_submodule(one.readers[0])
        with (
            removing(model.get_submodule(one.embedding).register_forward_hook(flat)),
            removing(reader.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))),
            torch.no_grad(),
        ):
            denoiser.predict(given)
        rows = seen[0].movedim(1, -1) if seen[0].dim() == 4 else seen[0]
        rows = rows.flatten(1, -2)
        torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))


def test_sizes_are_means_of_the_normed_embedding(source: Source) -> None:
    denoiser = Denoiser(make_one_level(groups=4))
    source.pipeline.unet = denoiser.model
    data, found = source.record(every(2, range(3))), scaled_channels(denoiser.model)
    assert [one.readers for one in found] == [
        (one.embedding.replace("time_emb_proj", "conv2"),) for one in found
    ]
    sizes, block = mean_sizes(denoiser, found, data, 4, Silent()), denoiser.model.mid_block.resnets[0]
    t = torch.cat([part.arguments["timestep"] for part in data.batches(3)])
    with torch.no_grad():
        embedded = block.time_emb_proj(F.silu(denoiser.model.time_embedding(denoiser.model.time_proj(t))))
    grouped = embedded.double().unflatten(1, (4, -1))
    normed = (grouped - grouped.mean(2, keepdim=True)) / (
        grouped.var(2, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    wanted = torch.where(normed > 1, normed, 1).flatten(1).mean(0)
    assert wanted.max() > 1.1
    torch.testing.assert_close(sizes["mid_block.resnets.0.conv2"].double(), wanted, rtol=1e-3, atol=1e-4)


def test_states_are_noised_again_to_the_level_of_their_step(source: Source) -> None:
    """And an error that is put into the quantized network is found."""
    kept, data = kept_of(source.pipeline.scheduler), source.record(every(3, (4, 5)))
    assert torch.equal(kept.float(), source.pipeline.scheduler.alphas_cumprod)
    with insert(Denoiser.of(source.pipeline), scheme("w8a16")) as network:
        set_weight_ranges(network, minmax)
        again = NoisedAgain(network, data, kept, 0, 2)
        assert again.mean_errors(10, 1, Silent())[0] == 0
        exact = again.mean_error(4)
        hook = network.denoiser.model.register_forward_hook(
            lambda *parts: (parts[2][0] + 0.25 * enabled(network),)
        )
        with removing(hook):
            assert again.mean_error(4) == pytest.approx(exact + 0.25, abs=0.01)
            assert again.mean_errors(6, 3, Silent())[2:] == [0.0, 0.0, 0.0, 0.0]
            replaced = replace(again, data=source.record(every(3, range(6))))
            assert [error > 0.1 for error in replaced.mean_errors(6, 2, Silent())] == [False] * 2 + [True] * 4
        now, later = ({data.t: torch.tensor([t] * 2), data.x: torch.zeros(2, 3, 64, 64)} for t in (700, 300))
        noise = again.noised(now, later, Generator().manual_seed(0))
        assert float(noise.var()) == pytest.approx(1 - float(kept[700] / kept[300]), rel=0.03)
        assert again.noised({**now, data.t: torch.tensor([0.5, 1.0])}, later, Generator()) is None


def enabled(network: object) -> bool:
    return any(quantizer.enabled for quantizer in network.quantizers())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        *((kind, grid) for kind in ("linear", "2d") for grid in ("int4/channel", "uint4/channel/asym")),
        ("2d", "int4/group27"),
    ],
)
def test_weights_grow_until_the_first_of_them_fills_its_range(kind: str, grid: str) -> None:
    """The equation, weight by weight, and the same scales before and after."""
    layer, x = layer_of(kind, grid)
    layer.layer.weight[:, 2] *= 0.3
    layer.layer.weight[:, 4] = 0
    set_ranges(layer, layer.layer.weight)
    exact, weight = layer.layer(x), layer.layer.weight.double()
    scale, zero_point = (value.double() for value in layer.weight_quantizer.range())
    per, levels = weight[0].numel() // (len(scale) // 5), layer.weight_quantizer.grid
    wanted = torch.full((6,), torch.inf, dtype=torch.float64)
    flat = weight.flatten(1)
    taps = flat.shape[1] // 6
    for output in range(5):
        for place in range(flat.shape[1]):
            row = output * (flat.shape[1] // per) + place // per
            value = flat[output, place]
            end = (levels.qmax if value > 0 else levels.qmin) - zero_point[row]
            if value != 0:
                channel = place // taps
                wanted[channel] = min(wanted[channel], float(max(end * scale[row] / value, 1.0)))
    wanted[wanted.isinf()] = 1.0
    torch.testing.assert_close(dilation(layer).double(), wanted, rtol=1e-4, atol=1e-5)
    before = layer.weight_quantizer.range()[0].clone()
    assert dilate({"l": layer}) == (
        {"l": pytest.approx(float(wanted.mean()), rel=1e-4)} if wanted.max() > 1.001 else {}
    )
    assert wanted[2] > 1.5 or not levels.symmetric
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight_quantizer.range()[0], before)
    assert float(dilation(layer).max()) == pytest.approx(1.0, abs=1e-3), "there is no room left"
    if levels.symmetric:
        set_ranges(layer, layer.weight)
        torch.testing.assert_close(layer.weight_quantizer.range()[0], before)
