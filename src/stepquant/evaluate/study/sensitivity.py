"""How much each site hurts when it alone has few bits: one site at a time, over sites, bits and metrics.

Content and quality are told apart as in arXiv:2405.17873: by the structure of the images (SSIM), and by what a network
sees in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.calib.cache import cache_folder
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import one_each
from stepquant.calib.record import Source, trajectory_seed
from stepquant.core.digest import value_digest
from stepquant.errors import EvaluationError, UnknownNameError
from stepquant.evaluate.metrics.classifiers import shipped_classifier
from stepquant.evaluate.metrics.pairs import TOO_SMALL, psnr, ssim
from stepquant.evaluate.networks.reader import Extractor
from stepquant.evaluate.study.sites import StudiedSite, plan_with, studied_sites
from stepquant.fit.alone import enabled, set_ranges
from stepquant.fit.lines import Lines
from stepquant.models.call import Asked
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent
from stepquant.quant.insert import insert
from stepquant.quant.plan import PORTS, Plan

FORMAT = 1
# What each metric is, whether it needs images, and which way is better.
METRICS = {
    "noise": "relative error of the noise prediction on recorded states; lower is better",
    "psnr": "PSNR of images to those of the float model, in decibels; higher is better",
    "ssim": "their structural similarity: content; higher is better",
    "features": "relative distance of what the embedded classifier sees in them: quality; lower is better",
}
FIRST_SEED = 900_000  # of images; neither calibration nor evaluation comes here


@dataclass(frozen=True)
class Study:
    """What is measured, and with how much data."""

    bits: tuple[int, ...] = (4, 6, 8)
    metrics: tuple[str, ...] = ("noise",)
    samples: int = 32  # recorded states
    steps: int = 20  # of their trajectories
    images: int = 8
    image_steps: int = 8
    sampler: str | None = None
    seed: int = 0
    ports: tuple[str, ...] = ()  # of sites, as in plans; none: all that the plan quantizes

    def check(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise UnknownNameError("metric", name, METRICS)
        if not self.bits or not all(2 <= bits <= 8 for bits in self.bits):
            raise EvaluationError("a site has 2 to 8 bits", got=list(self.bits), expected="--bits 4,6,8")

        known = [port for ports in PORTS.values() for port in ports]
        for name in self.ports:
            if name not in known:
                raise UnknownNameError("port", name, known)

    @property
    def wants_images(self) -> bool:
        return any(name != "noise" for name in self.metrics)


def sensitivity(
    pipeline: Any,
    plan: Plan,
    study: Study,
    *,
    prompts: Sequence[Asked] = (),
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Rows {path, role, port, bits, metric, value} of every site that `plan` quantizes, and what the sites cost."""
    study.check()
    progress, folder, denoiser = progress or Silent(), cache or cache_folder(), Denoiser.of(pipeline)
    denoiser.model.eval()
    sites = studied_sites(denoiser, plan, first_arguments(pipeline, 1, prompts), study.ports)
    source = Source(
        pipeline,
        Sampling(study.steps, study.sampler, tuple(prompts)),
        study.seed,
        cache=folder,
        progress=progress,
    )
    steps = torch.linspace(0, source.steps - 1, study.samples).round().long()
    data = source.record(one_each(steps))
    meter = Meter(pipeline, data, study, prompts)
    asked = {
        name: value for name, value in asdict(study).items() if name != "bits"
    }  # a later study of the same folder may ask for more
    key = value_digest([FORMAT, source.key(one_each(steps)), plan.to_json(), asked, meter.digest])
    lines = Lines(folder / "sensitivity" / f"{key[:32]}.jsonl")
    measure_all(denoiser, plan, sites, study, data, meter, lines, progress)
    finished = lines.read()
    rows = [
        {
            "path": site.path,
            "role": site.role,
            "port": site.port,
            "bits": bits,
            "metric": metric,
            "value": value,
        }
        for site in sites
        for bits in study.bits
        for metric, value in finished[f"{site.key}@{bits}"].items()
    ]
    model = {"class": type(denoiser.model).__name__, "digest": denoiser.digest()}
    known = {"format": FORMAT, "model": model, "study": asdict(study), "plan": plan.to_json()}
    return known | {"sites": [site.to_json() for site in sites], "rows": rows}


def measure_all(
    denoiser: Denoiser,
    plan: Plan,
    sites: Sequence[StudiedSite],
    study: Study,
    data: CalibSet,
    meter: Meter,
    lines: Lines,
    progress: Progress,
) -> None:
    """Measure what the journal does not hold yet."""
    finished = lines.read()
    left = [(bits, site) for bits in study.bits for site in sites if f"{site.key}@{bits}" not in finished]
    tracked = iter(progress.track(left, "one site at a time", len(left)))
    for bits in study.bits:
        todo = [site for width, site in left if width == bits]
        if not todo:
            continue
        narrow = plan_with(f"{bits} bits", plan, {site.key: bits for site in sites}, sites)
        with insert(denoiser, narrow) as network:
            set_ranges(network, data)
            by_key = {str(quantizer.site): quantizer for quantizer in network.quantizers()}
            for site in todo:
                next(tracked)
                with enabled(by_key[site.key]):
                    lines.append(f"{site.key}@{bits}", meter())
                progress.note(f"{bits} bits, {site.key}")
    for _ in tracked:  # so that the progress bar reaches its end
        pass


class Meter:
    """Measures the model in its present state against its outputs when the meter was made."""

    def __init__(self, pipeline: Any, data: CalibSet, study: Study, prompts: Sequence[Asked]) -> None:
        self.pipeline, self.study = pipeline, study
        self.sampling = Sampling(study.image_steps, study.sampler, tuple(prompts))
        self.denoiser = Denoiser.of(pipeline)
        wanted = "features" in study.metrics
        self.extractor: Extractor | None = shipped_classifier().extractor() if wanted else None
        self.digest = self.extractor.digest if self.extractor else ""
        self.arguments = next(iter(data.batches(len(data)))).arguments
        self.target = self.predict()
        self.images = self.draw() if study.wants_images else None
        self.seen = self.extractor(self.images) if self.extractor and self.images is not None else None
        if "ssim" in study.metrics and self.images is not None and ssim(self.images, self.images) is None:
            raise EvaluationError(f"cannot measure ssim: {TOO_SMALL}", fix="choose other metrics")

    def __call__(self) -> dict[str, float]:
        """The value of every metric."""
        images = self.draw() if self.study.wants_images else None
        measures: Mapping[str, Callable[[], float]] = {
            "noise": self.noise,
            "psnr": lambda: self.likeness(psnr, images),
            "ssim": lambda: self.likeness(ssim, images),
            "features": lambda: self.distance(images),
        }
        return {name: measures[name]() for name in self.study.metrics}

    def predict(self) -> Tensor:
        with torch.no_grad():
            return self.denoiser.predict(self.arguments).float()

    def draw(self) -> Tensor:
        seeds = [trajectory_seed(self.study.seed, FIRST_SEED + i) for i in range(self.study.images)]
        with torch.no_grad():
            return run(self.pipeline, seeds, self.sampling)

    def noise(self) -> float:
        error = (self.predict() - self.target).flatten(1).norm(dim=1) / self.target.flatten(1).norm(dim=1)
        return float(error.square().mean().sqrt())

    def likeness(self, metric: Callable[[Tensor, Tensor], Tensor | None], images: Tensor | None) -> float:
        assert images is not None
        assert self.images is not None
        values = metric(self.images, images)
        assert values is not None
        return float(values.mean())

    def distance(self, images: Tensor | None) -> float:
        assert images is not None
        assert self.extractor is not None
        assert self.seen is not None
        apart = (self.extractor(images) - self.seen).norm(dim=1) / self.seen.norm(dim=1)
        return float(apart.square().mean().sqrt())
