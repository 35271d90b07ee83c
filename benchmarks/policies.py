"""What steps in float give and cost: python benchmarks/policies.py [MODEL [SCHEME [STEPS]]].

All rows run the same integers, of minmax with 96 records. PSNR is of 16 images to those of the float model; time is that of two
images, by the processor's clock on one thread, all rows in turn, five times: the median, and its ratio to the row without
a policy with the least and the largest of a turn.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import stepquant
from stepquant.core.policy import FloatSteps, StepPolicy
from stepquant.job.inplace import run, source_of
from stepquant.job.recipe import Recipe
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import sample
from stepquant.models.sampling import Sampling
from stepquant.runtime.lower import lower

POLICIES = (None, *(StepPolicy(*ends) for ends in ((0, 1), (1, 1), (0, 3), (3, 0), (3, 3))))
IMAGES, TIMED, TURNS, FIRST_SEED = 16, 2, 5, 9000


def pipelines_of(recipe: Recipe) -> dict[str, Any]:
    """The float pipeline, and one in integers for each policy."""
    pipeline = stepquant.load(recipe.model)
    artifact, times = run(pipeline, recipe), source_of(pipeline, recipe).times()
    component, found = Denoiser.of(pipeline).component, {"float": pipeline}
    for policy in POLICIES:
        steps = None if policy is None else FloatSteps.of(policy, component, times)
        model = lower(copy.deepcopy(getattr(pipeline, component)), replace(artifact, policy=steps))
        found[str(policy or "none")] = one = copy.copy(
            pipeline
        )  # which keeps the names of classes, by which it is asked
        one.register_modules(**{component: model})
    return found


def made(pipeline: Any, images: int, steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return torch.cat(list(sample(pipeline, range(FIRST_SEED, FIRST_SEED + images), Sampling(steps))))


def timed(pipeline: Any, steps: int) -> float:
    start = time.process_time()
    made(pipeline, TIMED, steps)
    return time.process_time() - start


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Of images from 0 to 1; the mean over them."""
    error = (found.clamp(0, 1) - wanted.clamp(0, 1)).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def main(model: str = "stepquant:characters", scheme: str = "w8a8", steps: str = "25") -> None:
    torch.set_num_threads(1)
    count = int(steps)
    found = pipelines_of(
        Recipe.of(model=model, method="minmax", scheme=scheme, steps=count, settings={"samples": 96})
    )
    wanted = made(found["float"], IMAGES, count)
    quality = {name: psnr(made(one, IMAGES, count), wanted) for name, one in found.items() if name != "float"}
    turns = [{name: timed(one, count) for name, one in found.items()} for _ in range(TURNS)]
    print(f"{model} {scheme}, {count} steps\n{'policy':16} {'PSNR':>8} {'seconds':>8} {'ratio':>6}  range")
    for name in found:
        ratios = [turn[name] / turn["none"] for turn in turns]
        spent = statistics.median(turn[name] for turn in turns)
        shown = f"{quality[name]:8.2f}" if name in quality else " " * 8
        print(
            f"{name:16} {shown} {spent:8.2f} {statistics.median(ratios):6.2f}  {min(ratios):.2f} to {max(ratios):.2f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
