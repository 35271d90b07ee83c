from __future__ import annotations

from dataclasses import replace

import torch

from stepquant import methods
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Silent
from stepquant.quant.schemes import scheme

FEW = {"samples": 24, "trajectories": 6, "batch": 8}


def test_bias_correction_moves_biases_and_nothing_else(source: Source) -> None:
    plain, shifted = (
        methods.build("minmax", FEW | {"bias": bias})(Denoiser.of(source.pipeline), scheme("w4a8"), source)
        for bias in (False, True)
    )
    moved = {name for name, value in plain.tensors.items() if not torch.equal(value, shifted.tensors[name])}
    assert moved
    assert all(name.endswith(".bias") for name in moved)
    path = "mid_block.resnets.0.conv1"
    assert torch.equal(plain.tensors[f"{path}.bias"], source.pipeline.unet.get_submodule(path).bias)


def test_records_come_from_as_many_trajectories_as_are_asked_for(source: Source) -> None:
    methods.build("minmax", FEW)(Denoiser.of(source.pipeline), scheme("w8a8"), source)
    (folder,) = {shard.parent for shard in source.cache.rglob("*.safetensors")}
    assert len(list(folder.glob("*.safetensors"))) == 2, "6 trajectories in batches of 4"


def test_scales_that_come_with_the_activations_need_no_records(source: Source) -> None:
    told: list[str] = []

    class Noted(Silent):
        def note(self, words: str) -> None:
            told.append(words)

    own = replace(source, progress=Noted())
    artifact = methods.build("minmax", FEW)(Denoiser.of(source.pipeline), scheme("w8a8-dynamic"), own)
    assert not list(source.cache.rglob("*.safetensors"))
    assert told == ["no activation has a range to measure: nothing is recorded"]
    assert artifact.layers["conv_out"].input == Grid.parse("int8/token")
