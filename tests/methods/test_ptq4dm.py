from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import Pick, one_each
from stepquant.calib.record import Source
from stepquant.core.affine import scale_and_zero
from stepquant.core.ranges import lp_search
from stepquant.errors import CalibrationError, MethodError, UnknownNameError
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme

FEW = {"samples": 12, "batch": 6}


def run(source: Source, name: str = "ptq4dm", plan: str = "w8a8", **settings: object) -> Artifact:
    return methods.build(name, FEW | settings)(Denoiser.of(source.pipeline), scheme(plan), source)


def same(first: Artifact, second: Artifact) -> bool:
    return all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())


def picks(source: Source, monkeypatch: pytest.MonkeyPatch, **settings: object) -> list[Pick]:
    """What the method asks to have recorded."""
    asked: list[Pick] = []
    monkeypatch.setattr(
        Source, "record", lambda self, picks: asked.extend(picks) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(replace(source, sampling=Sampling(100)), samples=1024, mean=0.3, std=0.2, **settings)
    levels = 1 - torch.tensor([float(pick.step) for pick in asked]) / 100
    assert levels.mean().item() == pytest.approx(0.3, abs=0.05)
    return asked


def test_one_record_per_trajectory_at_normal_steps(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of the paper: N records from N float trajectories, biased towards the clean image."""
    asked = picks(source, monkeypatch)
    assert len({pick.trajectory for pick in asked}) == len(asked) == 1024


def test_fewer_trajectories_give_the_same_steps(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, paper = picks(source, monkeypatch, trajectories=64), picks(source, monkeypatch)
    assert len({pick.trajectory for pick in asked}) == 64
    assert len(set(asked)) == len(asked) == 1024
    assert sorted(pick.step for pick in asked) == sorted(pick.step for pick in paper)


def test_weight_ranges_minimise_the_two_point_four_norm(source: Source) -> None:
    artifact = run(source, plan="w4a8")
    for path, spec in artifact.layers.items():
        weight = source.pipeline.unet.get_submodule(path).weight.detach().flatten(1)
        expected, _ = scale_and_zero(*partial(lp_search, p=2.4)(weight, spec.weight), spec.weight)
        assert torch.equal(artifact.tensors[f"{path}.weight_scale"], expected)


def test_attention_and_every_layer_are_quantized(source: Source) -> None:
    artifact, denoiser = run(source), Denoiser.of(source.pipeline)
    assert set(artifact.layers) == set(denoiser.sites())
    assert set(artifact.products) == set(denoiser.products())


@pytest.mark.usefixtures("coarse")
def test_ablations_choose_other_data(source: Source, tmp_path) -> None:
    Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / "a.png")
    variants = [
        {},
        {"times": "uniform"},
        {"times": "single"},
        {"data": "noise"},
        {"data": "images", "images": str(tmp_path)},
        {"data": "diffused", "images": str(tmp_path)},
        {"clamp": True, "mean": 0.0},
        {"p": 1.0},
    ]
    artifacts = [run(source, **settings) for settings in variants]
    for index, artifact in enumerate(artifacts):
        assert not any(same(artifact, other) for other in artifacts[:index]), variants[index]


def test_percentiles_narrow_the_ranges(source: Source) -> None:
    whole, most = run(source, "minmax"), run(source, "minmax", percent=99)
    inputs = [name for name in whole.tensors if name.endswith("input_scale")]
    assert all(most.tensors[name] <= whole.tensors[name] * 1.05 for name in inputs)
    assert sum(bool(most.tensors[name] < whole.tensors[name]) for name in inputs) > len(inputs) / 2


def test_images_must_be_given(source: Source) -> None:
    with pytest.raises(CalibrationError, match="images=FOLDER"):
        run(source, data="images")


def test_a_smaller_error_than_minmax_on_heavy_tails(source: Source) -> None:
    with torch.no_grad():
        for weight in source.pipeline.unet.parameters():
            if weight.ndim == 4:
                weight.copy_(weight * weight.abs() * 20)
    data = source.record(one_each(torch.arange(10)))
    arguments = data.take(range(10)).arguments
    denoiser = Denoiser.of(source.pipeline)
    target = denoiser.predict(arguments).detach()
    state = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    errors = {}
    for name in ("minmax", "ptq4dm"):
        artifact = run(source, name, "w4a8")
        with torch.no_grad():
            for path, spec in artifact.layers.items():
                layer = denoiser.model.get_submodule(path)
                rows = layer.weight.flatten(1)
                scale = artifact.tensors[f"{path}.weight_scale"][:, None]
                layer.weight.copy_(
                    ((rows / scale).round().clamp(spec.weight.qmin, spec.weight.qmax) * scale).view_as(
                        layer.weight
                    )
                )
            errors[name] = (denoiser.predict(arguments) - target).pow(2).mean().item()
        denoiser.model.load_state_dict(state)
    assert errors["ptq4dm"] < errors["minmax"]


def test_fields_are_checked() -> None:
    with pytest.raises(MethodError, match="field 'mean'"):
        methods.build("ptq4dm", {"mean": 0.9})
    with pytest.raises(UnknownNameError, match="samples"):
        methods.build("ptq4dm", {"sample": 3})
    with pytest.raises(UnknownNameError, match="ptq4dm"):
        methods.build("ptq4d")
