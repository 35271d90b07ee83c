"""A quantized pipeline at its fastest on this machine: layers whose integers would be slower stay in float."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stepquant import hub
from stepquant.calib.cache import atomically, cache_folder
from stepquant.errors import StepquantError
from stepquant.evaluate.describe import cpu_name
from stepquant.evaluate.metrics.reference import file_digest
from stepquant.job.pipelines import prompts_of
from stepquant.models.call import Asked
from stepquant.models.denoiser import Denoiser, by_denoiser
from stepquant.models.hooks import first_arguments
from stepquant.progress import Progress
from stepquant.runtime import ops
from stepquant.runtime.cpu.float_layers import LayerTime, Seconds, choose_float_layers


def fastest(
    pipeline: Any, batch: int = 1, *, prompts: Sequence[Asked] | None = None, progress: Progress | None = None
) -> list[LayerTime]:
    """Let layers of `pipeline` that bfloat16 computes faster here, for such batches, stay in it; returns all times.

    The predictions of an artifact then depend on the machine. Times are measured once for a machine and a shape.
    """
    known = KnownTimes()
    try:
        return [
            found for one in by_denoiser(pipeline) for found in of_one(one, batch, prompts, known, progress)
        ]
    finally:
        known.keep()


def of_one(
    pipeline: Any, batch: int, prompts: Sequence[Asked] | None, known: KnownTimes, progress: Progress | None
) -> list[LayerTime]:
    """The same for one denoiser."""
    model = Denoiser.of(pipeline).model
    config = hub.config_of(model)
    if config is None:
        raise StepquantError("only a quantized pipeline has layers in integers", fix="load an artifact")
    arguments = first_arguments(pipeline, batch, prompts or prompts_of(config))
    return choose_float_layers(model, arguments, known.here, progress=progress)


class KnownTimes:
    """Times of layers by machine, in the user's cache; a file that cannot be read counts as none."""

    def __init__(self) -> None:
        self.file, self.machine = cache_folder() / "layer-times.json", machine()
        self.here = self.read().get(self.machine, {})
        self.known = len(self.here)

    def read(self) -> dict[str, dict[str, Seconds]]:
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            return {
                machine: {
                    layer: (float(integer), float(floating)) for layer, (integer, floating) in times.items()
                }
                for machine, times in data.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def keep(self) -> None:
        if len(self.here) == self.known:
            return
        text = json.dumps(self.read() | {self.machine: self.here}, indent=1) + "\n"
        atomically(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def machine() -> str:
    """What times depend on beside the layer and its input."""
    found = find_spec("stepquant._C") if ops.compiled() else None
    built = None if found is None else found.origin
    kernels = "none" if built is None else file_digest(Path(built))[:12]
    threads = torch.get_num_threads()
    return (
        f"{cpu_name()}, {ops.capability()}, {threads} threads, torch {torch.__version__}, kernels {kernels}"
    )
