"""What the distance to data hears: python benchmarks/distance.py [MODEL [IMAGES [STEPS]]].

Images of the float model are changed by known amounts. A row says how far in PSNR and, in percent, how much farther from the data
they lie than before, with its 95 % interval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from stepquant.evaluate.metrics.classifiers import shipped_classifier
from stepquant.evaluate.metrics.frechet import Statistics, change_interval, frechet, merge
from stepquant.evaluate.metrics.measure import BLOCK_ROWS, as_saved
from stepquant.evaluate.metrics.reference import read_data
from stepquant.evaluate.networks.reader import Extractor
from stepquant.job.pipelines import load
from stepquant.job.results import DATA
from stepquant.models import zoo
from stepquant.models.generate import sample
from stepquant.models.sampling import Sampling

AT_ONCE, FIRST_SEED = 64, 9000
BINOMIAL = torch.tensor([1.0, 2.0, 1.0])
Change = Callable[[Tensor], Tensor]


def changes() -> Mapping[str, Change]:
    """Each of images from 0 to 1."""
    found: dict[str, Change] = {}
    for factor in (0.98, 0.99, 0.995, 1.005, 1.01, 1.02):
        found[f"contrast times {factor}"] = lambda x, factor=factor: middle(x) + factor * (x - middle(x))  # type: ignore[misc]
    for shift in (-0.01, -0.004, 0.004, 0.01):
        found[f"brightness {shift:+}"] = lambda x, shift=shift: x + shift  # type: ignore[misc]
    for share in (-0.05, 0.05):
        found[f"blur {share:+.0%}"] = lambda x, share=share: x + share * (blurred(x) - x)  # type: ignore[misc]
    for size in (0.006, 0.01, 0.02):
        found[f"noise of {size}"] = lambda x, size=size: x + size * noise(x)  # type: ignore[misc]
    return found


def middle(x: Tensor) -> Tensor:
    """The mean of every channel of every image."""
    return x.mean((2, 3), keepdim=True)


def blurred(x: Tensor) -> Tensor:
    kernel = torch.outer(BINOMIAL, BINOMIAL).div(16).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def noise(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=Generator().manual_seed(0))


def blocks_of(images: Tensor, extractor: Extractor) -> tuple[Statistics, ...]:
    rows = torch.cat([extractor(some) for some in as_saved(images).split(AT_ONCE)])
    return tuple(map(Statistics.of, rows.split(BLOCK_ROWS)))


def psnr(found: Tensor, wanted: Tensor) -> float:
    """The mean over images from 0 to 1."""
    return float((-10 * (found - wanted).square().flatten(1).mean(1).clamp(min=1e-12).log10()).mean())


def main(model: str = "stepquant:characters", images: str = "1024", steps: str = "25") -> int:
    pipeline, source = load(model), DATA[model]
    pipeline.set_progress_bar_config(disable=True)
    asked = Sampling(int(steps), None, zoo.prompts(model))
    seeds = range(FIRST_SEED, FIRST_SEED + int(images))
    x = torch.cat(list(sample(pipeline, seeds, asked, batch=AT_ONCE))).float()
    extractor = shipped_classifier(source).extractor()
    data = merge(read_data(source, extractor)[extractor.name].blocks)
    own = blocks_of(x, extractor)
    base = frechet(merge(own), data)
    print(f"{model}, {len(x):,} images of {steps} steps, distance {base:.0f}\n")
    print("| change | PSNR dB | farther, % |\n|---|---|---|")
    for name, change in changes().items():
        y = change(x).clamp(0, 1)
        blocks = blocks_of(y, extractor)
        more = 100 * (frechet(merge(blocks), data) / base - 1)
        low, high = (100 * end / base for end in change_interval(blocks, own, data) if end is not None)
        print(f"| {name} | {psnr(y, x):.1f} | {more:+.1f} ± {(high - low) / 2:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
