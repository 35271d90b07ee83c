"""The mean of all pictures that noise leaves open, for pictures that are composed of parts: what a denoiser is to predict.

A noisy picture is usually trained towards the one that it was made of, though it may have been made of many. Their mean
has the same expectation and far less variance (Rao and Blackwell; of other pictures of the data in place of parts: Xu et
al. 2023, arXiv:2302.00670). Two kinds of parts at a time are open here and the others known, so that it is a sum over a
few thousand pictures, in a few products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from data import DataError
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import console

from stepquant.calib.cache import atomically
from stepquant.core.digest import tensors_digest
from stepquant.evaluate.metrics.parts import Parts, named, read_parts


@dataclass(frozen=True)
class Kind:
    """All parts of one kind: where each is opaque, and its colours there."""

    covers: Tensor  # (count, pixels), 0 or 1
    colours: Tensor  # (count, 3, pixels) in [-1, 1], 0 where it does not cover

    def over(self, picked: Tensor, below: Tensor) -> Tensor:
        return below * (1 - self.covers[picked])[:, None] + self.colours[picked]

    def shown_by(self, x: Tensor) -> Tensor:
        """The product of each part's colours with x (n, 3, pixels), pixel by pixel."""
        return torch.einsum("ncp,kcp->nkp", x, self.colours)


class Compositions:
    """Of parts that are pasted one over the other; a picture is (n, kinds) numbers of its parts."""

    def __init__(self, parts: Parts) -> None:
        self.size, self.kinds = parts.size, []
        for kind in parts.kinds:
            covers = kind.covers.float()
            self.kinds.append(Kind(covers, (kind.colours.float() / 127.5 - 1) * covers[:, None]))

    def compose(self, picked: Tensor, below: int | None = None) -> Tensor:
        """Pictures (n, 3, pixels), of the kinds below one alone if it is given."""
        out = torch.zeros(len(picked), 3, self.size[0] * self.size[1])
        for kind, own in zip(self.kinds[:below], picked.T):
            out = kind.over(own, out)
        return out

    def mean(self, noisy: Tensor, signal: Tensor, sigma: Tensor, picked: Tensor) -> Tensor:
        """What is expected of the pictures in noisy = signal * picture + sigma * noise, (n, 3, h, w).

        Kinds are open in pairs from the top. What each pair adds has no expectation, so their sum has none.
        """
        known, x = self.compose(picked), noisy.flatten(2)
        expected = known.clone()
        for lower in range(len(self.kinds) - 2, -1, -2):
            expected += self.with_open(lower, x, signal, sigma, picked, known) - known
        return expected.unflatten(2, self.size)

    def with_open(
        self, lower: int, x: Tensor, signal: Tensor, sigma: Tensor, picked: Tensor, known: Tensor
    ) -> Tensor:
        """The mean over all pictures that differ from `known` in the kinds `lower` and `lower + 1`."""
        under, over, a = self.kinds[lower], self.kinds[lower + 1], signal[:, None, None]
        base, free = self.compose(picked, lower), torch.ones_like(x[:, :1])
        for kind, own in zip(self.kinds[lower + 2 :], picked[:, lower + 2 :].T):
            free = free * (1 - kind.covers[own])[:, None]
        # Squared errors where no kind above covers: of the lower part or what is below it, then of the upper one over both.
        below = (x - a * base).square().sum(1, keepdim=True)
        square = x.square().sum(1, keepdim=True)
        own = square - 2 * a * under.shown_by(x) + a.square() * under.colours.square().sum(1)
        errors = free * torch.where(under.covers > 0, own, below)
        upper = (free * square)[:, 0] @ over.covers.T - 2 * a[:, 0] * (
            (free * x).flatten(1) @ over.colours.flatten(1).T
        )
        upper += a[:, 0].square() * (free[:, 0] @ over.colours.square().sum(1).T)
        energy = errors.sum(2)[:, :, None] + upper[:, None] - errors @ over.covers.T
        chance = (-energy.flatten(1) / (2 * sigma.square()[:, None])).softmax(1).view_as(energy)
        seen = chance @ (1 - over.covers)  # that the lower part is chosen and not covered, by pixel
        made = (chance.sum(1) @ over.colours.flatten(1)).view_as(x)
        made += torch.einsum("nkp,kcp->ncp", seen, under.colours)
        made += (seen * (1 - under.covers)).sum(1, keepdim=True) * base
        return free * made + (1 - free) * known


def parts_of(images: Tensor, where: str, run: Path) -> tuple[Compositions, Tensor]:
    """What all these images are composed of, found once for a run: that takes minutes."""
    parts = read_parts(named(where))
    if images.shape[-2:] != parts.size:
        raise DataError(f"--parts {where}: these compose pictures of another size")
    key = f"{parts.digest}-{tensors_digest({'images': images})[:12]}"
    file, compositions = run / f"parts-{key}.safetensors", Compositions(parts)
    if not file.is_file():
        some = track(images.split(250), "finding the parts of the images", console=console)
        found = torch.cat([parts.nearest(batch.float() / 255).picked for batch in some])
        atomically(file, lambda temporary: save_file({"picked": found}, temporary))
    picked = load_file(file)["picked"]
    for batch, own in zip(images.split(1000), picked.split(1000), strict=True):
        made = (compositions.compose(own).view(batch.shape) + 1) * 127.5
        if not torch.equal(made.round().to(torch.uint8), batch):
            raise DataError(f"--parts {where}: some images are composed of no such parts; leave it out")
    return compositions, picked
