"""Numbers about a stream of images: every instrument there is, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from stepquant.errors import EvaluationError
from stepquant.evaluate.instruments import PROMPTS, Instruments, Networks, fit
from stepquant.evaluate.metrics import (
    OTHER_SEEDS,
    Batch,
    Measured,
    Number,
    mean_interval,
    measure,
    pair_number,
)
from stepquant.evaluate.sets import set_numbers


@dataclass(frozen=True)
class Judged:
    """What was measured of all images, as numbers and as it was kept, and their height and width."""

    size: tuple[int, int]
    measured: Measured
    numbers: list[Number]


def judge(
    batches: Iterator[Batch], networks: Networks, data: str | None, *, prompted: bool = False, keep: int = 0
) -> Judged:
    """Measure all batches; `data` as in `evaluate`, `keep` as many of the first images."""
    first = next(batches, None)
    if first is None:
        raise EvaluationError("no images to measure", fix="give --images a positive number")
    height, width = first.float.shape[-2:]
    tools = fit(networks, (height, width), data, prompted=prompted)
    measured = measure(chain([first], batches), tools.readers, keep, tools.metrics, tools.clip)
    return Judged((height, width), measured, numbers(measured, tools))


def numbers(measured: Measured, tools: Instruments) -> list[Number]:
    """Likeness of pairs first, then distances between sets, then what cannot be measured here and why."""
    out = [pair_number(metric, measured) for metric in tools.metrics]
    if tools.clip is not None:
        out.append(text_number(measured, tools.clip.digest, tools.clip.resize))
    for name, sets in measured.views.items():
        out += set_numbers(sets, tools.targets.get(name))
    return out + list(tools.missing)


def text_number(measured: Measured, extractor: str, resize: str) -> Number:
    """The mean agreement of images with their prompts, beside that of the float model's."""
    values = measured.texts["quantized"]
    low, high = mean_interval(values)
    means = {name: float(found.mean()) for name, found in measured.texts.items()}
    return Number(
        "CLIP score",
        PROMPTS,
        len(values),
        "higher",
        means["quantized"],
        low,
        high,
        reference=means["float"],
        floor=means.get("other"),
        floor_of=OTHER_SEEDS if "other" in means else "",
        extractor=extractor,
        resize=resize,
        note="100 times the cosine, per image, then the mean",
    )
