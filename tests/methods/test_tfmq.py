"""The time block apart: temporal confusion, finite-set ranges, the exact table, and models that have no such block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant import hub, methods
from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError, RuntimeSupportError
from stepquant.evaluate.trajectory.time_confusion import confusion
from stepquant.fit.time_block import ROLES, TimeBlock, time_chains
from stepquant.models.denoiser import Denoiser
from stepquant.quant.plan import Plan, Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower
from tests.conftest import make_unet
from tests.models.steered import source_of

pytestmark = pytest.mark.usefixtures("coarse")

TINY = {
    "trajectories": 2,
    "range_trajectories": 1,
    "at_steps": 2,
    "iterations": 2,
    "batch": 4,
    "intervals": 2,
}


def narrow_time(bits: int = 3) -> Plan:
    """The time block itself in few bits, inputs too."""
    rules = [
        Rule(Grid(bits, granularity="channel"), "test", ("time", "modulate"), ("weight",)),
        Rule(Grid(8, signed=False, symmetric=False), "test", ("time", "modulate"), ("input",)),
    ]
    return scheme("w8a8").with_rules(rules)


def made(source: Source, plan: Plan, **settings: Any) -> Artifact:
    return methods.build("tfmq", TINY | settings)(Denoiser.of(source.pipeline), plan, source)


def embeddings(source: Source, model: Any) -> Tensor:
    """What all blocks add, for every t of the sampler."""
    chains = time_chains(Denoiser(source.pipeline.unet))
    block = TimeBlock(model, chains)
    with torch.no_grad():
        return torch.cat(block(StepTable.of(source.times()).times.float()), 1).float()


def rate(quantized: Tensor, exact: Tensor) -> float:
    found = confusion(list(quantized), list(exact), list(range(len(exact))))
    assert found is not None
    return float(found["rate"])


def test_temporal_confusion_does_not_rise(source: Source) -> None:
    """Fitting the block apart brings every embedding nearer to its own exact one than rounding to nearest does."""
    exact = embeddings(source, source.pipeline.unet)
    found = {}
    for iterations in (0, 300):
        artifact = made(source, narrow_time(), time_iterations=iterations)
        lowered = lower(copy.deepcopy(source.pipeline.unet), artifact, torch.float32)
        found[iterations] = embeddings(source, lowered)
    assert rate(found[300], exact) <= rate(found[0], exact)
    nearest, fitted = ((got - exact).square().mean().item() for got in (found[0], found[300]))
    assert fitted < 0.9 * nearest


def test_confusion_counts_steps_that_look_like_others() -> None:
    exact = torch.eye(4)
    assert rate(exact * 3, exact) == 0
    assert rate(exact[[1, 0, 2, 3]], exact) == 0.5


def test_the_table_is_without_confusion_and_has_no_layers(source: Source) -> None:
    artifact = made(source, scheme("w4a8"), time="table")
    assert artifact.steps is not None
    assert artifact.steps.table == artifact.tensors["steps.table"].shape[1]
    exact = embeddings(source, source.pipeline.unet)
    assert torch.equal(artifact.tensors["steps.table"], exact)
    assert rate(artifact.tensors["steps.table"], exact) == 0
    assert not [path for path in artifact.layers if "time" in path]


def test_where_t_enters_by_modulation_the_table_is_the_modulation(tmp_path: Path) -> None:
    """It has no layers; what is saved and loaded reads it, sample by sample, and refuses a t without a row."""
    source = source_of("qwen_image", tmp_path)
    denoiser = source.pipeline.denoiser
    alone = [path for path, role in denoiser.sites().items() if role in ROLES]
    artifact = made(source, scheme("w4a8"))
    assert artifact.steps is not None
    assert set(artifact.steps.tabled) == set(alone)
    assert not set(artifact.layers) & set(alone)
    assert not artifact.steps.tabled["time_text_embed.timestep_embedder.linear_2"], "only modulations read it"

    calls = [records.arguments for records in source.record(every(1, range(3))).batches(3)]  # at several t
    with torch.no_grad():
        exact = [denoiser.predict(call) for call in calls]
        hub.attach(denoiser.model, artifact)
        made_here = [denoiser.predict(call) for call in calls]
        denoiser.model.save_pretrained(tmp_path / "saved")
        loaded = Denoiser(type(denoiser.model).from_pretrained(tmp_path / "saved"))
        for call, here, want in zip(calls, made_here, exact):
            assert torch.equal(loaded.predict(call), here)
            assert (here - want).norm() < 0.1 * want.norm()
        with pytest.raises(RuntimeSupportError, match="no entry for that t|no entry for t"):
            loaded.predict({**calls[0], "timestep": calls[0]["timestep"] + 0.01})


def test_what_is_tabled_follows_t_alone(tmp_path: Path) -> None:
    """A class enters the modulation of a DiT, whose embedding of t is left."""
    source = source_of("class_transformer", tmp_path)
    steps = made(source, scheme("w4a8")).steps
    assert steps is not None
    assert all("timestep_embedder" in path for path in steps.tabled)
    with pytest.raises(MethodError, match="no time embedding of the declared kind"):
        made(source, scheme("w4a8"), time="reconstruct")


def test_every_interval_has_ranges_of_its_own(source: Source) -> None:
    artifact = made(source, narrow_time(), intervals=3)
    assert artifact.steps is not None
    assert artifact.steps.groups == 3
    stored = {name: value for name, value in artifact.tensors.items() if name.endswith("_scale")}
    time = [value for name, value in stored.items() if "time_emb_proj.input" in name]
    assert time
    assert all(len(value) == 3 for value in time)
    assert any(len(value.unique()) == 3 for value in time)
    assert artifact.layers["conv_out"].input.granularity == "step"


def test_blocks_leave_the_time_block_as_it_is(source: Source) -> None:
    """Its integers are the same, however long the blocks around it are fitted."""
    few, many = (made(source, scheme("w4a8"), time_iterations=20, iterations=n) for n in (2, 12))
    for name, value in few.tensors.items():
        if "time_emb" in name and name.endswith(".weight"):
            assert torch.equal(value, many.tensors[name]), name
    moved = [
        n
        for n, v in few.tensors.items()
        if n.endswith("conv1.weight") and not torch.equal(v, many.tensors[n])
    ]
    assert moved


def test_a_model_whose_time_block_is_another_is_named(source: Source) -> None:
    source.pipeline.unet = make_unet()
    source.pipeline.unet.mid_block.resnets[0].time_embedding_norm = "scale_shift"
    with pytest.raises(MethodError, match="no time embedding of the declared kind"):
        made(source, scheme("w8a8"), time="reconstruct")
