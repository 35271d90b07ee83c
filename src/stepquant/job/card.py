"""The model card of a finished artifact, from the folder alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stepquant import hub
from stepquant.calib.cache import atomically
from stepquant.job.files import CARD
from stepquant.job.pipelines import STEPS, calibrated_with, load
from stepquant.job.results import artifact_config, describe_alone, measured_so_far
from stepquant.models.call import Asked, Call, steps_of
from stepquant.models.generate import sample
from stepquant.models.pipelines.modular import is_modular
from stepquant.models.pipelines.results import IMAGES, SOUNDS, output_name
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress
from stepquant.report import card
from stepquant.report.media import file_for, write_media

SAMPLES, SHOWN = "samples", 16


def write_card(
    folder: str | os.PathLike[str],
    calls: Sequence[Asked] = (),
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """README.md and a grid of images beside the weights of an artifact, with what was measured of it so far.

    `calls`: what the images are asked by, where the artifact holds only the sizes of pictures; without, it shows none.
    What it says of the float model stands in the artifact. README.md is written last: where it is, the card is whole.
    """
    place = Path(folder)
    pipeline = load(place, device)
    config = artifact_config(pipeline, place)
    shown = shown_with(config, calls)
    made = draw(pipeline, shown, progress)
    known = measured_so_far(place, describe_alone(pipeline, place))
    samples, output = None, output_name(made[0].ndim if made else IMAGES, pipeline)
    if made and made[0].ndim != SOUNDS:  # which no page plays
        samples = file_for(made[0], None, SAMPLES).name
        write_media(made, place / samples)
    text = card(known, samples, shown.steps, output, modular=is_modular(pipeline))
    atomically(place / CARD, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return place / CARD


def draw(pipeline: Any, shown: Sampling, progress: Progress | None) -> list[Tensor]:
    """What the card is about; nothing where calls lack their pictures."""
    if any(isinstance(one, Call) and one.stands_in for one in shown.prompts):
        return []
    return list(sample(pipeline, range(SHOWN), shown, progress=progress))


def shown_with(config: hub.StepquantConfig, calls: Sequence[Asked] = ()) -> Sampling:
    """How the images of the card are sampled: as it was calibrated, in fewer steps where any will do."""
    made = calibrated_with(config)
    asked = tuple(calls) or made.prompts
    steps = made.steps if config.steps or steps_of(asked, None) else min(made.steps, STEPS)
    return replace(made, prompts=asked, steps=steps)
