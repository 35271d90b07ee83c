from __future__ import annotations

import pytest
import torch

from stepquant.artifact import Artifact, LayerSpec
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import dequantize
from stepquant.core.bounds import BYTES, check_tensors
from stepquant.core.grid import Grid
from stepquant.core.pack import unpack
from stepquant.core.ranges import minmax
from stepquant.errors import ArtifactError
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import SCHEMES, scheme


def frozen(source: Source, plan: Plan, split: bool = False) -> tuple[Artifact, dict[str, torch.Tensor]]:
    """The artifact, and the weights with which its fake-quant network multiplies."""
    data = source.record(every(2, (2, 8)))
    with insert(Denoiser.of(source.pipeline), plan, split=split) as network:
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        network.switch(weights=True, inputs=True)
        return freeze(network), {
            path: layer.weight_values().detach() for path, layer in network.layers.items()
        }


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_integers_are_the_weights_that_were_evaluated(source: Source, name: str) -> None:
    artifact, weights = frozen(source, scheme(name))
    for path, spec in artifact.layers.items():
        weight = weights[path]
        integers = unpack(artifact.tensors[f"{path}.weight"], spec.weight, weight.numel()).reshape(
            weight.shape[0], -1
        )
        scale = artifact.tensors[f"{path}.weight_scale"][:, None]
        assert torch.equal(dequantize(integers, scale, 0).reshape(weight.shape), weight)
        stored = spec.input is not None and spec.input.granularity != "token"
        assert stored == (f"{path}.input_scale" in artifact.tensors)
    assert all(
        value.dtype in (torch.uint8, torch.float32, torch.int16, torch.int32)
        for value in artifact.tensors.values()
    )


def test_asymmetric_group_weights_carry_zero_points(source: Source) -> None:
    grid = Grid.parse("uint3/group4")
    plan = Plan("mine", (Rule(grid, "groups", ("conv",), ("weight",)), Rule(None, "rest")))
    artifact, weights = frozen(source, plan)
    path = next(iter(artifact.layers))
    scale, zero = (artifact.tensors[f"{path}.weight_{n}"][:, None] for n in ("scale", "zero_point"))
    integers = unpack(artifact.tensors[f"{path}.weight"], grid, weights[path].numel()).reshape(-1, 4)
    assert torch.equal(dequantize(integers, scale, zero).reshape(weights[path].shape), weights[path])


def test_specs_round_trip_through_json(source: Source) -> None:
    artifact, _ = frozen(source, scheme("w4a8"), split=True)
    data = artifact.to_json()
    assert {path: LayerSpec.from_json(spec) for path, spec in data["layers"].items()} == artifact.layers
    assert {path: tuple(widths) for path, widths in data["splits"].items()} == dict(
        Denoiser.of(source.pipeline).concats()
    )


def test_freezing_leaves_the_float_model_alone(source: Source) -> None:
    before = {name: value.clone() for name, value in source.pipeline.unet.state_dict().items()}
    frozen(source, scheme("w4a4"), split=True)
    after = source.pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_expendable_weights_go_as_they_are_packed(source: Source) -> None:
    """Those that others read as well stay; what is packed is the same."""
    unet = source.pipeline.unet
    attention = unet.mid_block.attentions[0]
    attention.to_k.weight = attention.to_q.weight
    expected, _ = frozen(source, scheme("w4a8"))
    with insert(Denoiser(unet).giving_up(True), scheme("w8a16")) as network:
        set_weight_ranges(network, minmax)
        made = freeze(network)
    assert made.layers.keys() == expected.layers.keys()
    shared = {"mid_block.attentions.0.to_k", "mid_block.attentions.0.to_q"}
    for path in made.layers:
        weight = unet.get_submodule(path).weight
        assert weight.shape.numel() > 1
        assert bool(weight.isnan().all()) == (weight.untyped_storage().nbytes() == 4) == (path not in shared)
    keys, queries = (made.tensors[f"{path}.weight"] for path in shared)
    assert torch.equal(keys, queries)


def test_check_names_the_tensor() -> None:
    good, packed = {"a": torch.zeros(2), "b": torch.zeros(3)}, {"b": BYTES}
    check_tensors(good, good, "here", packed)
    check_tensors(good | {"a": torch.zeros(2).half()}, good, "here", packed)
    for wrong, message in (
        ({"a": good["a"]}, "'b' is missing"),
        (good | {"c": torch.zeros(1)}, "'c' is foreign"),
        (good | {"b": torch.zeros(4)}, "'b' has the wrong shape"),
        (good | {"b": torch.zeros(3).half()}, "'b' has the wrong dtype"),
        (good | {"a": torch.zeros(2, dtype=torch.int8)}, "'a' has the wrong dtype"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_tensors(wrong, good, "here", packed)
