from __future__ import annotations

from typing import Any

import pytest
import torch

from stepquant import methods
from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.pack import unpack
from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme

FEW = {"samples": 24, "trajectories": 6, "batch": 8}


def run(source: Source, **settings: Any) -> Artifact:
    return methods.build("gptq", FEW | settings)(Denoiser.of(source.pipeline), scheme("w4a8"), source)


@pytest.mark.usefixtures("coarse")
def test_the_model_stays_float_and_integers_move_by_more_than_one(source: Source) -> None:
    model = source.pipeline.unet
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours = run(source)
    nearest = run(source, damping=1.0)  # errors are hardly spread any more
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    steps = torch.cat(
        [
            (
                unpack(ours.tensors[f"{path}.weight"], spec.weight, count)
                - unpack(nearest.tensors[f"{path}.weight"], spec.weight, count)
            ).abs()
            for path, spec in ours.layers.items()
            for count in [model.get_submodule(path).weight.numel()]
        ]
    )
    assert steps.max() > 1


@pytest.mark.usefixtures("coarse")
def test_fields_change_what_they_say(source: Source) -> None:
    plain, ordered, shifted = (
        run(source, **o) for o in ({}, {"act_order": True, "split": True}, {"bias": True})
    )
    path = "mid_block.resnets.0.conv1"
    assert not torch.equal(plain.tensors[f"{path}.weight"], ordered.tensors[f"{path}.weight"])
    assert ordered.splits
    assert not plain.splits
    assert torch.equal(plain.tensors[f"{path}.weight"], shifted.tensors[f"{path}.weight"])
    assert torch.equal(plain.tensors[f"{path}.bias"], source.pipeline.unet.get_submodule(path).bias)
    assert not torch.equal(plain.tensors[f"{path}.bias"], shifted.tensors[f"{path}.bias"])
