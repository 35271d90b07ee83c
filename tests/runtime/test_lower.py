import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from stepquant.core.affine import quantize
from stepquant.core.grid import Grid
from stepquant.errors import ArtifactError
from stepquant.quant.insert import Inserted
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import lower, prepare, runtime_modules, skeleton
from tests.models.tiny import conditional
from tests.runtime.synthetic import (
    TIMES,
    VARIANTS,
    artifact_of,
    calling,
    make,
    noise,
    quantized,
    relative,
)


@torch.no_grad()
def compare(
    model: nn.Module, plan: Plan, split: bool = False
) -> tuple[list[Tensor], list[Tensor], nn.Module]:
    """Outputs of the fake-quant network, those of the lowered one in float32, and the lowered network."""
    artifact, fake = quantized(model, plan, calling(model), split)
    lowered = lower(model, artifact, torch.float32)
    return fake, [calling(lowered)(t) for t in TIMES], lowered


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4", "w8a16"])
def test_every_layer_is_the_fake_quant_layer(variant: str, name: str) -> None:
    """On the very input that the fake-quant layer received: the same codes, and the output within float32 rounding."""
    model = make(**VARIANTS[variant])
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(network: Inserted) -> None:
        for path, layer in network.weighted().items():
            layer.register_forward_hook(lambda _m, args, out, path=path: seen.update({path: (args[0], out)}))

    artifact, _ = quantized(model, scheme(name), calling(model), watch=watch)
    lowered = lower(model, artifact, torch.float32)
    assert set(seen) == set(artifact.layers)
    for path, (x, out) in seen.items():
        layer = lowered.get_submodule(path)
        if layer.spec.input is not None:
            scale, zero_point = layer.input_scale, layer.input_zero_point
            integers = quantize(x, scale, zero_point, layer.spec.input) - layer.spec.input.qmin
            codes = ops.quantize(x, layer.code).int() - layer.code.low
            assert torch.equal(codes.float(), integers), path
        torch.testing.assert_close(layer(x), out, rtol=1e-4, atol=1e-5 * out.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", [False, True])
def test_the_lowered_network_is_as_near_to_float_as_the_fake_quant_network(variant: str, split: bool) -> None:
    """A number moved over a rounding border by the order of a sum changes what follows by steps of the grid, so that
    the two networks differ by no more than their common distance to the float network."""
    model = make(**VARIANTS[variant])
    floating = [calling(model)(t) for t in TIMES]
    fake, got, lowered = compare(model, scheme("w8a8"), split)
    for one, other, true in zip(got, fake, floating):
        assert relative(one, other) < 1.2 * relative(other, true)
        assert relative(one, true) < 1.2 * relative(other, true)
    if split:
        assert any(path.endswith("conv1.1") for path in runtime_modules(lowered))


@pytest.mark.parametrize("name", ["w4a8", "w6a6", "w8a16", "w4a16"])
def test_every_scheme_lowers(name: str) -> None:
    model = make()
    floating = [calling(model)(t) for t in TIMES]
    fake, got, _ = compare(model, scheme(name))
    for one, other, true in zip(got, fake, floating):
        assert relative(one, other) < 1.2 * relative(other, true)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_stays_inside_and_moves_little(dtype: torch.dtype) -> None:
    model = make()
    reference = copy.deepcopy(model)
    x = noise(2, 3, 16, 16)
    artifact = artifact_of(model)
    lowered = lower(model, artifact, dtype)
    inner: list[torch.dtype] = []
    lowered.mid_block.register_forward_hook(lambda _m, _a, out: inner.append(out.dtype))
    out = lowered(x, 100).sample
    assert out.dtype == torch.float32
    assert inner == [dtype]
    assert lowered.dtype == torch.float32
    assert relative(out, reference(x, 100).sample) < 0.05


@torch.no_grad()
def test_names_of_the_state_dict_do_not_change_and_come_back() -> None:
    model = make()
    x = noise(2, 3, 16, 16)
    artifact = artifact_of(model)
    names = set(model.state_dict())
    lowered = lower(copy.deepcopy(model), artifact)
    state = lowered.state_dict()
    floats = {name for name in names if name.rpartition(".")[0] not in artifact.layers}
    assert set(state) == floats | set(artifact.tensors)
    other = prepare(skeleton(make(), artifact.layers, artifact.products, artifact.splits))
    assert not torch.equal(other(x, 9).sample, lowered(x, 9).sample)
    other.load_state_dict(state)
    assert torch.equal(other(x, 9).sample, lowered(x, 9).sample)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_skeleton_on_the_meta_device_takes_the_tensors_later() -> None:
    model = make()
    x = noise(1, 3, 16, 16)
    artifact = artifact_of(model, split=True)
    whole = lower(copy.deepcopy(model), artifact)
    with torch.device("meta"):
        hollow = make()
    skeleton(hollow, artifact.layers, artifact.products, artifact.splits)
    assert {t.device.type for t in hollow.state_dict().values()} == {"meta"}
    hollow.load_state_dict(whole.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(prepare(hollow)(x, 3).sample, whole(x, 3).sample)


@torch.no_grad()
def test_copies_and_repeated_preparation_give_the_same_bytes() -> None:
    model = make()
    x = noise(2, 3, 16, 16)
    artifact = artifact_of(model)
    lowered = lower(model, artifact)
    out = lowered(x, 5).sample
    assert torch.equal(lowered(x, 5).sample, out)
    assert torch.equal(copy.deepcopy(lowered)(x, 5).sample, out)
    assert torch.equal(prepare(prepare(lowered))(x, 5).sample, out)
    assert torch.equal(
        prepare(lowered, torch.float32)(x, 5).sample, prepare(lowered, torch.float32)(x, 5).sample
    )
    twin = copy.deepcopy(lowered)
    for module in twin.modules():
        if isinstance(module, IntegerLayer):
            module.weight_scale.mul_(2)
    assert torch.equal(prepare(lowered)(x, 5).sample, out)


@torch.no_grad()
def test_layers_kept_in_float_fit_in() -> None:
    """Float convolutions, linears and products between integer ones, in bfloat16."""
    rules = (
        Rule(None, "test", path="*attentions*"),
        Rule(None, "test", path="*resnets.0.conv1"),
        Rule(None, "test", path="*downsamplers*"),
        Rule(None, "test", roles=("stem", "head", "time")),
    )
    plan = scheme("w8a8").with_rules(rules)
    plan = Plan("test", tuple(Rule(**{**vars(rule), "optional": True}) for rule in plan.rules))
    model = make()
    x = noise(2, 3, 16, 16)
    artifact, _ = quantized(model, plan, calling(model))
    reference = model(x, 10).sample
    assert relative(lower(model, artifact)(x, 10).sample, reference) < 0.05


@torch.no_grad()
def test_a_text_conditioned_network_lowers() -> None:
    torch.manual_seed(0)
    model: UNet2DConditionModel = conditional().eval()
    x, text = noise(2, 4, 16, 16), noise(2, 7, 32)
    reference = model(x, 10, text).sample
    artifact, fake = quantized(model, scheme("w8a8"), lambda t: model(x, t, text).sample)
    lowered = lower(copy.deepcopy(model), artifact, torch.float32)
    # A last bit that falls to the other side moves a random network by about 3 %.
    assert relative(lowered(x, 10, text).sample, fake[0]) < 0.04
    halved = lower(model, artifact)(x, 10, text).sample
    assert halved.dtype == torch.float32
    assert relative(halved, reference) < 0.05


def test_foreign_and_missing_tensors_are_named() -> None:
    model = make()
    artifact = artifact_of(model)
    broken = dict(artifact.tensors)
    broken.pop("conv_in.weight_scale")
    with pytest.raises(ArtifactError, match=r"conv_in\.weight_scale"):
        lower(copy.deepcopy(model), type(artifact)(artifact.layers, artifact.products, broken))
    assert Grid.parse("int8/channel") == artifact.layers["conv_in"].weight
