"""Folders of artifacts, and ways to write others in their place that agree with their own digests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant import hub, methods
from stepquant.artifact import UNCOVERED, Artifact, StepSpec, table_tensors
from stepquant.calib.record import Source
from stepquant.core.digest import value_digest
from stepquant.core.grid import Grid
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.models.blocks.structure import structure
from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


def save(source: Source, folder: Path, plan: str = "w8a8", steps: bool = False) -> Path:
    """A pipeline folder whose denoiser is quantized; returns the denoiser's folder."""
    denoiser = Denoiser.of(source.pipeline)
    artifact = methods.build("minmax", {"samples": 8, "batch": 8})(denoiser, scheme(plan), source)
    hub.attach(denoiser.model, stepped(artifact, denoiser, source.times()) if steps else artifact)
    source.pipeline.save_pretrained(folder)
    return folder / denoiser.component


def stepped(artifact: Artifact, denoiser: Denoiser, times: Tensor) -> Artifact:
    """The artifact with everything that may have a row for each step; what the rows say is made up."""
    table, chains = StepTable.of(times), structure(denoiser.model)
    width = sum(block.width for block in chains.residuals if block.timed)
    layers = {path: spec for path, spec in artifact.layers.items() if path not in chains.time_layers()}
    path = next(path for path, spec in layers.items() if spec.input is not None)
    layers[path] = replace(layers[path], input=Grid.parse("uint8/step"))
    tensors = {k: v for k, v in artifact.tensors.items() if k.rpartition(".")[0] not in chains.time_layers()}
    for name in (f"{path}.input_scale", f"{path}.input_zero_point"):
        tensors[name] = tensors[name].repeat(table.groups)
    tensors |= table_tensors(table) | {"steps.table": torch.linspace(-1, 1, width).repeat(len(times), 1)}
    spec = StepSpec(len(times), table.groups, width)
    ones = torch.ones(len(times), denoiser.shape[0])
    made = replace(artifact, layers=layers, tensors=tensors, steps=spec)
    return made.with_correction(StepCorrection(1.1 * ones, 0.1 * ones, 0.01 * ones), table)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def write(folder: Path, config: Any, tensors: dict[str, Tensor] | None = None) -> None:
    (folder / CONFIG).write_text(json.dumps(config))
    if tensors is not None:
        save_file(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
            folder / WEIGHTS,
            {"format": "pt"},
        )


def agree(
    config: dict[str, Any], tensors: dict[str, Tensor] | None = None, format: int | None = None
) -> None:
    """Make every digest in `config` that of what is there, as somebody would who means to deceive."""
    told = config["quantization_config"]
    if tensors is not None:
        told["digests"] = hub.digests_of(tensors)
    told["settings"] = hub.settings_digest(config)
    if format is not None:
        told["format"] = format
    covered = {key: told.get(key) for key in hub.KEYS if key != "settings"}
    if told.get("format") == UNCOVERED:
        del told["settings"]
        covered = told.get("digests")
    told["digest"] = value_digest(covered)
