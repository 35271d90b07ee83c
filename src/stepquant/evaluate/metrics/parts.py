"""Parts that pictures are composed of, pasted one over the other, and the composition that is nearest to a picture."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepquant.core.digest import tensors_digest
from stepquant.errors import EvaluationError
from stepquant.models import zoo

EMBEDDED, FILE_NAME = "stepquant:characters-features", "parts.npz"
EXPECTED = (
    "an .npz file with an array (count, height, width, RGBA) of bytes for each kind, in the order of pasting"
)
ABSENT = -1
AT_ONCE = 64  # pictures: what memory holds does not grow with their number


@dataclass(frozen=True)
class Kind:
    """All parts of one kind, such as hats: where each is opaque, and its colours there."""

    name: str
    covers: Tensor  # (count, pixels), 0 or 1
    colours: Tensor  # (count, 3, pixels) in levels of 255, 0 where it does not cover

    @classmethod
    def of(cls, name: str, pixels: Tensor) -> Kind:
        """From RGBA (count, h, w, 4)."""
        flat = pixels.double().flatten(1, 2)
        covers = (flat[..., 3] > 0).double()
        return cls(name, covers, flat[..., :3].movedim(2, 1) * covers[:, None])

    def to(self, dtype: torch.dtype) -> Kind:
        return Kind(self.name, self.covers.to(dtype), self.colours.to(dtype))

    def over(self, picked: Tensor, x: Tensor, below: Tensor) -> Tensor:
        """Squared error (n, pixels) to pictures x (n, 3, pixels) with the picked parts over what has error `below`."""
        return torch.where(self.covers[picked] > 0, (x - self.colours[picked]).square().sum(1), below)

    def all_over(self, x: Tensor, below: Tensor) -> Tensor:
        """The same (n, count, pixels) with each part in turn."""
        own = x.square().sum(1)[:, None] + self.colours.square().sum(1)
        for channel in range(x.shape[1]):
            own.addcmul_(x[:, None, channel], self.colours[None, :, channel], value=-2)
        return torch.where(self.covers > 0, own, below[:, None])

    def nearest(self, x: Tensor, below: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """For each picture which of the errors `below` (n, m, pixels) and which part over it have the least error where
        it is free of what lies above."""
        # free * (covers * |x - colour|^2 + (1 - covers) * below), multiplied out into products of matrices.
        own = (free * x.square().sum(1)) @ self.covers.T + free @ self.colours.square().sum(1).T
        own -= 2 * (free[:, None] * x).flatten(1) @ self.colours.flatten(1).T
        left = below * free[:, None]
        total = left.sum(2)[:, :, None] + own[:, None] - left @ self.covers.T
        best = total.flatten(1).argmin(1)
        return best // len(self.covers), best % len(self.covers)


@dataclass(frozen=True)
class Nearest:
    """The nearest composition of each picture: its parts, and the squared error where each of them is seen."""

    picked: Tensor  # (n, kinds)
    errors: Tensor  # (n, kinds), in levels of 255, summed over pixels and colours
    seen: Tensor  # (n, kinds), pixels


@dataclass(frozen=True)
class Parts:
    """Kinds in the order in which they are pasted; the first covers everything."""

    kinds: tuple[Kind, ...]
    size: tuple[int, int]
    digest: str

    def compose(self, picked: Tensor) -> Tensor:
        """Images (n, 3, h, w) in [0, 1] of parts (n, kinds)."""
        out = torch.zeros(len(picked), 3, self.size[0] * self.size[1], dtype=torch.float64)
        for kind, own in zip(self.kinds, picked.T):
            out = torch.where(kind.covers[own][:, None] > 0, kind.colours[own], out)
        return (out / 255).float().unflatten(2, self.size)

    def nearest(self, images: Tensor) -> Nearest:
        """Of images (n, 3, h, w) in [0, 1], by trying all parts of one kind after the other, in rounds."""
        if images.ndim != 4 or images.shape[1:] != (3, *self.size):
            raise EvaluationError(
                "these parts compose pictures of another size",
                got="x".join(str(side) for side in images.shape[1:]),
                expected=f"3x{self.size[0]}x{self.size[1]}",
            )
        found = [
            self.search((some.float() * 255).double().flatten(2)) for some in images.cpu().split(AT_ONCE)
        ]
        return Nearest(*(torch.cat([getattr(one, name) for one in found]) for name in vars(found[0])))

    def search(self, x: Tensor) -> Nearest:
        """Coordinate descent: every kind alone, then pairs of neighbouring kinds, which leave minima in which each alone is
        stuck, then every kind alone again. In the first round nothing lies above the kind that is picked."""
        picked = torch.full((len(x), len(self.kinds)), ABSENT)
        for dtype, together in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
            self.sweep(x.to(dtype), picked, together)
        seen, errors, below = [], [], x.new_zeros(len(x), x.shape[2])
        for level, kind in enumerate(self.kinds):
            here = kind.covers[picked[:, level]] * self.free(picked, level)
            below = kind.over(picked[:, level], x, below)
            seen.append(here.sum(1))
            errors.append((here * below).sum(1))
        return Nearest(picked, torch.stack(errors, 1), torch.stack(seen, 1))

    def sweep(self, x: Tensor, picked: Tensor, together: bool) -> None:
        """Pick every kind anew, from below, each with the one below it where they are tried together."""
        kinds = [kind.to(x.dtype) for kind in self.kinds]
        deeper = below = x.new_zeros(len(x), x.shape[2])
        for level, kind in enumerate(kinds):
            pair = together and level > 0
            tried = kinds[level - 1].all_over(x, deeper) if pair else below[:, None]
            lower, own = kind.nearest(x, tried, self.free(picked, level).to(x.dtype))
            if pair:
                picked[:, level - 1] = lower
                below = tried[torch.arange(len(x)), lower]
            picked[:, level] = own
            deeper, below = below, kind.over(own, x, below)

    def free(self, picked: Tensor, level: int) -> Tensor:
        """Where (n, pixels) no part of a kind above `level` covers: 1, elsewhere 0."""
        out = torch.ones(len(picked), self.size[0] * self.size[1], dtype=torch.float64)
        for above, kind in enumerate(self.kinds[level + 1 :], level + 1):
            if picked[0, above] != ABSENT:
                out *= 1 - kind.covers[picked[:, above]]
        return out


def named(where: str) -> Path:
    """`characters`, which the package carries, or a file."""
    return zoo.path(EMBEDDED) / FILE_NAME if where == "characters" else Path(where)


def read_parts(file: Path | None = None) -> Parts:
    """Of a file of the user's, else those of the characters that the embedded models draw."""
    file = file or zoo.path(EMBEDDED) / FILE_NAME
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(np.array(stored[name])) for name in stored.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"cannot read the parts: {error}", where=str(file), expected=EXPECTED
        ) from error
    check_parts(arrays, file)
    kinds = tuple(Kind.of(name, pixels) for name, pixels in arrays.items())
    height, width = next(iter(arrays.values())).shape[1:3]
    ordered = {f"{place} {name}": pixels for place, (name, pixels) in enumerate(arrays.items())}
    return Parts(kinds, (height, width), tensors_digest(ordered)[:12])


def check_parts(arrays: Mapping[str, Tensor], file: Path) -> None:
    first = next(iter(arrays.values()), torch.zeros(0))
    wrong = "the file holds no parts" if not arrays else ""
    for name, pixels in arrays.items():
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 4 or not len(pixels):
            wrong = f"'{name}' is {pixels.dtype} of shape {tuple(pixels.shape)}"
        elif pixels.shape[1:] != first.shape[1:]:
            wrong = f"the parts of '{name}' have another size than the first ones"
        elif not ((pixels[..., 3] == 0) | (pixels[..., 3] == 255)).all():
            wrong = f"'{name}' is transparent in part: alpha is 0 or 255"
    if not wrong and not (first[..., 3] == 255).all():
        wrong = "the first kind lets something through: nothing is below it"
    if wrong:
        raise EvaluationError(wrong, where=str(file), expected=EXPECTED)
