"""Metrics of single images: the CLIP score, and shares of images that are recognised, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from stepquant.evaluate.metrics.number import OTHER_SEEDS, Number, mean_interval
from stepquant.evaluate.networks.clip import ClipScore

PROMPTS = "prompts"


@dataclass(frozen=True)
class TextMetric:
    """The CLIP score."""

    clip: ClipScore

    def read(self, images: Tensor, asked: Sequence[str]) -> Tensor:
        return self.clip(images, asked)

    def numbers(self, values: Mapping[str, Tensor]) -> list[Number]:
        note = "100 times the cosine, per image, then the mean"
        return [mean_number("CLIP score", PROMPTS, values, "", self.clip.digest, self.clip.resize, note)]


def mean_number(
    name: str, against: str, values: Mapping[str, Tensor], unit: str, extractor: str, resize: str, note: str
) -> Number:
    """The mean over images, higher is better, beside the mean of the float model's images."""
    low, high = mean_interval(values["quantized"])
    change = mean_interval(values["quantized"] - values["float"])
    means = {name: float(found.mean()) for name, found in values.items()}
    return Number(
        name,
        against,
        len(values["quantized"]),
        "higher",
        means["quantized"],
        low,
        high,
        unit,
        reference=means["float"],
        change_low=change[0],
        change_high=change[1],
        floor=means.get("other"),
        floor_of=OTHER_SEEDS if "other" in means else "",
        extractor=extractor,
        resize=resize,
        note=note,
    )


def share_number(
    name: str, against: str, hits: Mapping[str, Tensor], better: str, extractor: str, note: str
) -> Number:
    """The percentage of images that are hits (true or false), beside that of the float model's; Wilson's interval."""
    shares = {name: 100 * float(found.double().mean()) for name, found in hits.items() if len(found)}
    ours = hits["quantized"]
    low, high = wilson(int(ours.sum()), len(ours))
    least, most = share_change(ours, hits["float"])
    return Number(
        name,
        against,
        len(ours),
        better,
        shares["quantized"],
        100 * low,
        100 * high,
        "%",
        reference=shares["float"],
        change_low=100 * least,
        change_high=100 * most,
        floor=shares.get("other"),
        floor_of=OTHER_SEEDS if "other" in shares else "",
        extractor=extractor,
        note=note,
    )


def share_change(ours: Tensor, own: Tensor) -> tuple[float, float]:
    """A 95 % interval of what `ours` has more hits than `own`, both of the same seeds (Newcombe 1998, paired)."""
    count = len(ours)
    both, neither = int((ours & own).sum()), int((~ours & ~own).sum())
    hits, others = int(ours.sum()), int(own.sum())
    (low, high), (least, most) = wilson(hits, count), wilson(others, count)
    below, above = hits / count - low, high - hits / count
    under, over = others / count - least, most - others / count
    spread = (hits * (count - hits) * others * (count - others)) ** 0.5
    correlation = (both * neither - (hits - both) * (others - both)) / spread if spread else 0.0
    change = (hits - others) / count
    down = below**2 - 2 * correlation * below * over + over**2
    up = above**2 - 2 * correlation * above * under + under**2
    return change - down**0.5, change + up**0.5


def wilson(hits: int, count: int) -> tuple[float, float]:
    """A 95 % interval of a share: it stays within 0 and 1, and has a width where all or none are hits."""
    z = 1.96
    share, scale = hits / count, 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)
