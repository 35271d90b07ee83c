"""All numbers about image quality, from one pass over batches of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.instruments import Instruments, Networks
from stepquant.evaluate.metrics.measure import Batch, Measured, measure, pair_number
from stepquant.evaluate.metrics.media import MEDIA, fit_media
from stepquant.evaluate.metrics.number import Number
from stepquant.evaluate.metrics.sets import set_numbers
from stepquant.evaluate.metrics.truth import Portion, Truth


@dataclass(frozen=True)
class Judged:
    """The numbers, the samples behind them, and the height and width of the images; of sounds, channels and samples."""

    size: tuple[int, int]
    medium: str
    measured: Measured
    numbers: list[Number]
    portions: list[Portion]  # of the error to legal images, where these are known


def judge(
    batches: Iterator[Batch], networks: Networks, data: str | None, *, prompted: bool = False, keep: int = 0
) -> Judged:
    """Measure all batches; `data` as in `evaluate`, `keep` as many of the first images."""
    first = next(batches, None)
    if first is None:
        raise EvaluationError("no images to measure", fix="give --images a positive number")
    height, width = first.float.shape[-2:]
    tools = fit_media(first.float, networks, data, prompted=prompted)
    measured = measure(chain([first], batches), tools.readers, keep, tools.metrics, tools.singles)
    return Judged(
        (height, width),
        MEDIA[first.float.ndim],
        measured,
        numbers(measured, tools),
        portions(measured, tools),
    )


def numbers(measured: Measured, tools: Instruments) -> list[Number]:
    """Numbers in the order of a report: pairs, single images, distances between sets, and what could not be measured."""
    out = [pair_number(metric, measured) for metric in tools.metrics]
    for single, values in zip(tools.singles, measured.singles):
        out += single.numbers(values)
    for name, sets in measured.views.items():
        out += set_numbers(sets, tools.targets.get(name))
    return out + list(tools.missing)


def portions(measured: Measured, tools: Instruments) -> list[Portion]:
    pairs = zip(tools.singles, measured.singles)
    return [one for metric, values in pairs if isinstance(metric, Truth) for one in metric.portions(values)]
