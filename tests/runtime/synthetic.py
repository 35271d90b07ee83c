"""Fake-quant networks, artifacts and runtime layers with ranges from a quick pass, for tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from stepquant.artifact import Artifact, LayerSpec
from stepquant.core.affine import quantize, scale_and_zero, to_groups
from stepquant.core.grid import Grid
from stepquant.core.pack import pack
from stepquant.core.ranges import minmax
from stepquant.core.slices import Slices
from stepquant.fit.ranges import set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import Inserted, insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer
from stepquant.quant.schemes import scheme
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.tail import Done, NormOut
from stepquant.runtime.coverage import Coverage
from stepquant.runtime.cpu.products import why_no_integers
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer
from tests.models.tiny import unconditional

TIMES = (10, 355, 700)


def quantized(
    model: nn.Module,
    plan: Plan,
    call: Callable[[int], Tensor],
    split: bool = False,
    watch: Callable[[Inserted], None] = lambda network: None,
) -> tuple[Artifact, list[Tensor]]:
    """What `model` freezes to, ranges taken from `call(t)` at two times, and its fake-quant outputs at TIMES."""
    lows: dict[Quantizer, Tensor] = {}
    highs: dict[Quantizer, Tensor] = {}

    def observe(quantizer: Quantizer, seen: Slices) -> None:
        low, high = seen.ends
        lows[quantizer] = torch.minimum(lows.get(quantizer, low), low)
        highs[quantizer] = torch.maximum(highs.get(quantizer, high), high)
        scale, zero_point = scale_and_zero(lows[quantizer], highs[quantizer], quantizer.grid)
        quantizer.set_range(scale, zero_point)

    with torch.no_grad(), insert(Denoiser(model), plan, split=split) as network:
        set_weight_ranges(network, minmax)
        activations = network.ranged()
        for quantizer in activations:
            quantizer.observer = observe
        network.switch(weights=True, inputs=True)
        call(TIMES[0]), call(TIMES[-1])
        for quantizer in activations:
            quantizer.observer = None
        watch(network)
        return freeze(network), [call(t) for t in TIMES]


def filled(layer: nn.Module, spec: LayerSpec, low: float, high: float) -> IntegerLayer:
    """The runtime layer of `layer`, its input range from `low` to `high`."""
    new, weight = integer_layer(layer, spec, "layer"), layer.weight.detach()
    rows = to_groups(weight, spec.weight)
    scale, zero_point = scale_and_zero(rows.amin(1), rows.amax(1), spec.weight)
    new.weight.copy_(pack(quantize(rows, scale[:, None], zero_point[:, None], spec.weight), spec.weight))
    new.weight_scale.copy_(scale)
    if not spec.weight.symmetric:
        new.weight_zero_point.copy_(zero_point)
    if layer.bias is not None:
        new.bias.copy_(layer.bias.detach())
    if spec.input is not None and not new.dynamic:
        scale, zero_point = scale_and_zero(torch.tensor(low), torch.tensor(high), spec.input)
        new.input_scale.copy_(scale.reshape(1))
        new.input_zero_point.copy_(zero_point.reshape(1).to(torch.int32))
    return new


def integer_sums(layer: nn.Module, new: IntegerLayer, x: Tensor) -> Tensor:
    """sum (q_x - z_x) (q_w - z_w) without any rounding, in float64, by the float layer's own code."""
    spec = new.spec
    assert spec.input is not None
    q = quantize(x, new.input_scale, new.input_zero_point, spec.input).double() - new.input_zero_point
    integers, zero_point = new.rows()
    weight = (integers - zero_point).double().reshape(new.weight_shape)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(q, weight)
    return layer._conv_forward(q, weight, None)


def expected(layer: nn.Module, new: IntegerLayer, x: Tensor) -> Tensor:
    """What the layer must put out, in float64: sums times both scales plus bias. Scales are per output channel."""
    sums = integer_sums(layer, new, x)
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1,) + (1,) * (sums.dim() - 2)
    scale = (new.weight_scale.double() * new.input_scale.double()).expand(new.weight_shape[0]).reshape(shape)
    return sums * scale + (0 if new.bias is None else new.bias.double().reshape(shape))


def grids(text: str) -> LayerSpec:
    weight, _, inputs = text.partition(" ")
    return LayerSpec(Grid.parse(weight), Grid.parse(inputs) if inputs else None)


VARIANTS = {
    "plain": {},
    "one head": {"attention_head_dim": None},
    "border after": {"downsample_padding": 0},
    "two layers": {"layers_per_block": 2, "block_out_channels": (16, 24), "norm_num_groups": 4},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet resampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "class labels": {"num_class_embeds": 5},
    "mid factor": {"mid_block_scale_factor": 1.5},
    "no attention": {"add_attention": False},
}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options: object) -> UNet2DModel:
    torch.manual_seed(0)
    return unconditional(**options).eval()


def inputs_of(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    labels = {"class_labels": torch.arange(batch) % 5} if model.class_embedding is not None else {}
    return {"sample": noise(batch, 3, 16, 16), **labels}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def calling(model: nn.Module, batch: int = 2) -> Callable[[int], Tensor]:
    inputs = inputs_of(model, batch)
    return lambda t: model(timestep=torch.tensor(t), **inputs).sample


def check_blocks(lowered: nn.Module) -> list[type[Chain]]:
    """From now on every fused block is compared with the forward of its class, over the same layers and input."""
    seen: list[type[Chain]] = []
    given: dict[nn.Module, Tensor] = {}

    def first(args: tuple, kwargs: dict) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given[module] = first(args, kwargs).clone()

    def check(module: nn.Module, args: tuple, kwargs: dict, out: Tensor | tuple[Tensor, ...]) -> None:
        got = out if isinstance(out, Tensor) else out[0]
        if got.dtype == torch.uint8 or isinstance(module.forward, Done | NormOut):
            return
        assert torch.equal(first(args, kwargs), given[module]), "the input was written to: it may be a skip"
        skip = kwargs.pop("skip", None)
        args = args if skip is None else (torch.cat([args[0], skip], 1), *args[1:])
        want = type(module).forward(module, *args, **kwargs)
        assert relative(got, want if isinstance(want, Tensor) else want[0]) < 4e-3, type(module)
        seen.append(type(module.forward))

    for module in lowered.modules():
        if isinstance(module.__dict__.get("forward"), Chain):
            module.register_forward_pre_hook(keep, with_kwargs=True)
            module.register_forward_hook(check, with_kwargs=True)
    return seen


def artifact_of(model: nn.Module, split: bool = False) -> Artifact:
    return quantized(model, scheme("w8a8"), calling(model), split)[0]


def share_of_able(seen: Coverage) -> float:
    """Of the multiplications that the plan quantizes, the share that ran in integers; without convolutions with groups
    where the processor has no exact products for them."""
    missing = why_no_integers(groups=2)
    able = [line for line in seen.lines if line.planned and (missing is None or line.reason != missing)]
    return sum(line.macs for line in able if line.integer) / sum(line.macs for line in able)
