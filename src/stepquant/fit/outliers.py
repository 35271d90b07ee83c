"""Where the outliers of what linears read lie, in channels or in tokens, and groups of channels whose ranges are alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.fit.channels import finite, show_inputs
from stepquant.progress import Progress
from stepquant.quant.insert import Inserted
from stepquant.quant.layers import QuantLayer

ROUNDS = 100  # of clustering, which ends long before


class Ends:
    """The least and the greatest number of every channel and of every token that a layer reads, over all samples."""

    def __init__(self) -> None:
        self.channels: Tensor | None = None  # (2, channels)
        self.tokens: Tensor | None = None  # (2, tokens)
        self.aligned = True  # tokens have places: as many of them in every sample

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        self.channels = wider(self.channels, ends(x.reshape(-1, x.shape[-1])))
        known = None if self.tokens is None else self.tokens.shape[1]
        self.aligned &= x.ndim == 3 and known in (None, x.shape[1])
        if self.aligned:
            self.tokens = wider(self.tokens, ends(x.amax(-1)), ends(x.amin(-1)))

    def of(self, path: str) -> Tensor:
        """Those of the channels."""
        return finite(self.channels, path, "have no outliers")

    @property
    def in_tokens(self) -> bool:
        """Whether tokens differ more from each other than channels do."""
        if not self.aligned or self.tokens is None or self.channels is None:
            return False
        return spread_of(self.tokens) > spread_of(self.channels)


def ends(rows: Tensor) -> Tensor:
    """The least and the greatest number of every column."""
    return torch.stack([rows.amin(0), rows.amax(0)])


def wider(known: Tensor | None, *more: Tensor) -> Tensor:
    found = torch.stack([*more] if known is None else [known, *more])
    return torch.stack([found[:, 0].amin(0), found[:, 1].amax(0)])


def spread_of(found: Tensor) -> float:
    """How far the greatest numbers lie apart, and the least ones: (max_i a_i^max - min_i a_i^max) + the same of a_i^min."""
    return float((found.amax(1) - found.amin(1)).sum())


def ends_of_inputs(
    network: Inserted, layers: Mapping[str, QuantLayer], data: CalibSet, batch: int, progress: Progress
) -> dict[str, Ends]:
    """Of what every layer reads, in the float model."""
    seen = {path: Ends() for path in layers}
    show_inputs(
        network, layers, {path: one.add for path, one in seen.items()}, data, batch, progress, "outliers"
    )
    return seen


def groups_of(found: Tensor, groups: int) -> Tensor:
    """The group of every channel: k-means of their least and greatest numbers, from starts that lie far apart."""
    points = found.T.double().cpu().numpy()
    starts = farthest(points, min(groups, len(np.unique(points, axis=0))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a group that loses all its channels, which is as well
        _, labels = kmeans2(points, starts, iter=ROUNDS, minit="matrix")
    return torch.from_numpy(labels).long()


def farthest(points: np.ndarray, count: int) -> np.ndarray:
    """The point with the largest numbers, and then each time the one that lies farthest from those chosen."""
    chosen = [int(np.abs(points).sum(1).argmax())]
    while len(chosen) < count:
        distances = ((points[:, None] - points[chosen]) ** 2).sum(2).min(1)
        chosen.append(int(distances.argmax()))
    return points[chosen]


def factors_of(found: Tensor, labels: Tensor) -> Tensor:
    """What multiplies every channel so that each group reaches as far as all do, on the side where it reaches first.

    A scale of its own for every group, over one zero point.
    """
    low, high = found[0].clamp(max=0), found[1].clamp(min=0)
    factors = torch.ones_like(low)
    for group in labels.unique():
        mine = (labels == group).to(low.device)
        reaches = [low[mine].amin() / low.amin(), high[mine].amax() / high.amax()]
        most = torch.stack(reaches).nan_to_num(0.0).amax()  # a side on which nobody reaches anywhere
        factors[mine] = torch.where(most > 0, 1 / most, torch.ones_like(most))
    return factors
