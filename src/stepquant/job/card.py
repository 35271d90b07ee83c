"""The model card of a finished artifact, from the folder alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from stepquant import hub
from stepquant.calib.cache import atomically
from stepquant.job.files import CARD
from stepquant.job.pipelines import STEPS, calibrated_with, load
from stepquant.job.results import artifact_config, describe_alone, measured_so_far
from stepquant.models.generate import sample
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress
from stepquant.report import card
from stepquant.report.images import write_grid

GRID, SHOWN = "samples.png", 16


def write_card(
    folder: str | os.PathLike[str], *, device: str = "cpu", progress: Progress | None = None
) -> Path:
    """README.md and a grid of images beside the weights of an artifact, with what was measured of it so far.

    What it says of the float model stands in the artifact. README.md is written last: where it is, the card is whole.
    """
    place = Path(folder)
    pipeline = load(place, device)
    config = artifact_config(pipeline, place)
    shown = shown_with(config)
    batches = list(sample(pipeline, range(SHOWN), shown, progress=progress))
    known = measured_so_far(place, describe_alone(pipeline, place))
    write_grid(batches, place / GRID)
    text = card(known, GRID, shown.steps)
    atomically(place / CARD, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return place / CARD


def shown_with(config: hub.StepquantConfig) -> Sampling:
    """How the images of the card are sampled: as it was calibrated, in fewer steps where any will do."""
    made = calibrated_with(config)
    return made if config.steps else replace(made, steps=min(made.steps, STEPS))
