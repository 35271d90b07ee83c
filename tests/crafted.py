"""Folders of artifacts, and ways to write others in their place that agree with their own digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant import hub, methods
from stepquant.artifact import UNCOVERED
from stepquant.calib.record import Source
from stepquant.core.digest import value_digest
from stepquant.models.denoiser import Denoiser
from stepquant.quant.schemes import scheme

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
QUICK: dict[str, dict[str, Any]] = {
    "minmax": {"samples": 8, "batch": 8},
    "tfmq": {"trajectories": 2, "range_trajectories": 1, "at_steps": 2, "iterations": 2, "batch": 4, "intervals": 2},
    "d2dpm": {},
}  # fmt: skip


def save(source: Source, folder: Path, plan: str = "w8a8", method: str = "minmax", **settings: Any) -> Path:
    """A pipeline folder whose denoiser is quantized; returns the denoiser's folder."""
    denoiser = Denoiser.of(source.pipeline)
    made = methods.build(method, QUICK[method] | settings)
    hub.attach(denoiser.model, made(denoiser, scheme(plan), source))
    source.pipeline.save_pretrained(folder)
    return folder / denoiser.component


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def write(folder: Path, config: Any, tensors: dict[str, Tensor] | None = None) -> None:
    (folder / CONFIG).write_text(json.dumps(config))
    if tensors is not None:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


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
