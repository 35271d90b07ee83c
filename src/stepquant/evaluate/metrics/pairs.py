"""What quantization did to each image, from pairs (float, quantized) of the same seed; the survey's artefacts as numbers.

Colour shift, over-exposure, structure change and detail blur are the four classes of arXiv:2505.05215.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from stepquant.core.similarity import SSIM_WINDOW, ssim

# Equal images have no noise at all; pixels of 16 bits would reach 98 decibels.
MOST_DECIBELS = 100.0
TOO_SMALL = f"images are smaller than its window of {SSIM_WINDOW} pixels"
LUMA = (0.299, 0.587, 0.114)
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class PairMetric:
    """A number for each pair of images in [0, 1]; `better` is higher, lower, zero or one."""

    name: str
    measure: Callable[[Tensor, Tensor], Tensor | None]
    better: str
    unit: str = ""
    note: str = ""
    absent: str = ""  # why it may have nothing to say about images
    extractor: str = ""  # digest of the network that it needs


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, 100 at most."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=MOST_DECIBELS)


def colour_shift(a: Tensor, b: Tensor) -> Tensor:
    """Distance between the mean colours, in levels of 255."""
    means = [x.double().flatten(2).mean(2) for x in (a, b)]
    return 255 * (means[1] - means[0]).norm(dim=1)


def over_exposure(a: Tensor, b: Tensor) -> Tensor:
    """Percent of pixel values that are black or white in the second image and were not in the first, net."""
    clipped = [((x < 0.5 / 255) | (x > 254.5 / 255)).double().flatten(1).mean(1) for x in (a, b)]
    return 100 * (clipped[1] - clipped[0])


def structure_change(a: Tensor, b: Tensor) -> Tensor:
    """One minus the correlation of the two edge maps."""
    edges = [edge_strength(x).flatten(1) for x in (a, b)]
    centred = [x - x.mean(1, keepdim=True) for x in edges]
    product = (centred[0] * centred[1]).sum(1)
    return 1 - product / (centred[0].norm(dim=1) * centred[1].norm(dim=1)).clamp(min=1e-12)


def detail(a: Tensor, b: Tensor) -> Tensor:
    """Energy of the Laplacian of the second image over that of the first: below one is blur, above one noise."""
    energies = [filtered(luma(x), LAPLACE).square().flatten(1).mean(1) for x in (a, b)]
    return energies[1] / energies[0].clamp(min=1e-12)


def luma(images: Tensor) -> Tensor:
    """Brightness (n, 1, h, w) of images with three channels; the mean of any other number."""
    if images.shape[1] != len(LUMA):
        return images.double().mean(1, keepdim=True)
    return (images.double() * torch.tensor(LUMA, dtype=torch.float64).reshape(1, 3, 1, 1)).sum(
        1, keepdim=True
    )


def filtered(images: Tensor, kernel: tuple[tuple[float, ...], ...]) -> Tensor:
    weight = torch.tensor(kernel, dtype=images.dtype).reshape(1, 1, 3, 3)
    return conv2d(pad(images, (1, 1, 1, 1), mode="replicate"), weight)


def edge_strength(images: Tensor) -> Tensor:
    grey = luma(images)
    turned = tuple(zip(*SOBEL))
    return (filtered(grey, SOBEL).square() + filtered(grey, turned).square()).sqrt()


PAIR_METRICS = (
    PairMetric("PSNR", psnr, "higher", "dB", "per image, then the mean"),
    PairMetric("SSIM", ssim, "higher", "", "per image, then the mean", TOO_SMALL),
    PairMetric("colour shift", colour_shift, "lower", "levels", "between mean colours, of 255"),
    PairMetric("over-exposure", over_exposure, "zero", "%", "more pixel values at black or white"),
    PairMetric("structure change", structure_change, "lower", "", "one minus the correlation of edges"),
    PairMetric("detail", detail, "one", "", "Laplacian energy over that of float: below one is blur"),
)
