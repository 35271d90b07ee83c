"""A method on a tiny model, all the way: quantized, attached, saved, loaded, and the same bytes predicted."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from stepquant import hub, methods
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.methods.method import Method
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent
from stepquant.quant.schemes import scheme
from tests.contracts.smallest import few_of, made
from tests.models.steered import STEPS, source_of
from tests.models.tiny import CASES

PLAIN = "minmax"  # what corrections stand behind


def method_of(name: str) -> Method:
    """The method of that name with few of everything; a correction behind a plain method."""
    if not methods.corrects(name):
        return methods.build(name, few_of(name))
    fields = {f"{part}.{key}": value for part in (PLAIN, name) for key, value in few_of(part).items()}
    return methods.build(f"{PLAIN}+{name}", fields)


def source_for(kind: str, folder: Path) -> Source:
    """Trajectories of a tiny model: in a pipeline of its own where it is asked for nothing, so that one can be followed."""
    model, given, _ = CASES[kind]()
    if isinstance(model, UNet2DModel) and len(given) == len(("x", "t")):
        pipeline = DDIMPipeline(model, DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        return Source(pipeline, Sampling(STEPS), batch=4, cache=folder)
    return source_of(kind, folder)


def error_of(name: str, kind: str, bits: str, folder: Path, progress: Progress | None = None) -> float:
    """The greatest relative error at any step of what the method made of that model, which loading must not change."""
    source = replace(source_for(kind, folder / "records"), progress=progress or Silent())
    exact = Denoiser.of(source.pipeline)
    artifact = made(method_of(name), scheme(bits), source)
    served = copy.deepcopy(exact.model)
    hub.attach(served, artifact)
    served.save_pretrained(folder / "model")
    loaded: Any = type(served).from_pretrained(folder / "model")
    errors = []
    for records in source.record(every(1, range(STEPS))).batches(2):
        want, found, again = (predicted(model, records.arguments) for model in (exact.model, served, loaded))
        assert torch.equal(again, found), "what was loaded predicts other bytes than what was saved"
        errors.append(float((found - want).norm() / want.norm()))
    return max(errors)


def predicted(model: Any, arguments: Any) -> Tensor:
    with torch.no_grad():
        return Denoiser(model).predict(arguments)
