"""EDA-DM: calibration steps by density and variety, fine-grained block reconstruction (arXiv:2401.04585).

Differs from the released code:
- roundings have a regulariser; the code passes its settings on but leaves it out, so that soft and hard losses part.
- one pass gives the block's and its layers' outputs, with the same dropped elements; the code draws them anew.
- errors of token layers are summed over channels, as those of convolutions are; the code sums them over tokens.
- density counts neighbours nearer than a quartile of all distances, or than a share of their median. A fixed radius, as
  in the code, is one model's: where features lie nearer, 3.0 makes every step a neighbour of every other.
- records per step are shared out by largest remainders, and features that do not vary are left out of the score.
- no step has fewer records than a share of the even number; in the code, a step may have none.
- a trajectory gives several records, so that recording does not take longer than all the rest.
- fast preset: inputs are the quantized ones. Mixed half and half with float ones, as in the code, a block is fitted to
  half of the error that reaches it, and in few iterations that costs more than the mixing protects from overfitting.
- activation steps are learnt as factors of their start, so that one rate fits every site; published rates are absolute.
- fast preset: a block is done when its soft and hard losses agree, and small blocks have more iterations than large ones.
- a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.density import counts, likeness_of_steps, neighbours, says_nothing
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.losses import BlockLoss
from stepquant.fit.streams import Streams
from stepquant.methods.learning import BlockMethod
from stepquant.methods.method import split_here
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan

NO_DENSITY = (
    "density says nothing: every step has as many neighbours as any other, and variety alone decides how many records "
    "each gets. Another --set radius, a share of the median distance, may tell steps apart"
)


class EDADM(BlockMethod):
    """Temporal distribution alignment calibration (TDAC) and fine-grained block reconstruction (FBR)."""

    paper: ClassVar[dict[str, Any]] = {
        "samples": 1024,
        "trajectories": 1024,
        "chunk": 1024,
        "batch": 32,
        "iterations": 5000,
        "rounding_rate": 0.5,
        "last_rate": 0.0,
        "step_rate": 5e-4,
        "penalty": 0.0,
        "gap": 0.0,
        "by_size": 0.0,
        "mix": 0.5,
    }
    paper_at: ClassVar[dict[int, dict[str, Any]]] = {8: {"rounding_rate": 0.05, "step_rate": 1e-3}}
    samples: int = Field(512, ge=16, description="N: calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    times: Literal["tdac", "uniform"] = Field("tdac", description="how steps are drawn (ablation)")
    chunk: int = Field(16, gt=0, description="trajectories whose features decide the steps")
    variety: float = Field(1.2, ge=0, description="lambda: weight of variety beside density")
    radius: float | None = Field(
        None,
        ge=0,
        description="r: neighbours are nearer than this share of the median distance; none: than the lower quartile",
    )
    floor: float = Field(
        0.5, ge=0, le=1, description="records that every step has, as a share of what all have on average"
    )
    layers: float = Field(
        0.8, ge=0, description="gamma: weight of the layers in the loss; 0: block loss (ablation)"
    )
    step_rate: float = Field(
        1e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )
    mix: float = Field(1.0, gt=0, le=1, description="probability that an input element is the quantized one")
    keep: float = Field(
        0.5, gt=0, le=1, description="probability that an activation is quantized while learning"
    )

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        # TDAC: steps in proportion to the density and the variety of their features.
        data = source.record(spread(self.draw_steps(source), self.trajectories))

        split = split_here(True, False, denoiser, source)
        steps = self.by_steps(denoiser, plan, data, source, split)
        with (
            insert(denoiser, plan, split=split, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            reconstruct = self.reconstructing(streams, data, source)
            self.set_weight_ranges(network, source)
            self.set_input_ranges(network, data, source)

            # FBR: block loss plus gamma times the losses of its layers; roundings and steps are learnt together.
            schedule = self.schedule(
                scale_rate=self.step_rate, mix=self.mix, keep=self.keep, loss=BlockLoss(layers=self.layers)
            )
            reconstruct(schedule, stage="joint", activations=True)
            return freeze(network)

    def draw_steps(self, source: Source) -> torch.Tensor:
        if self.times == "uniform":
            return uniform(self.samples, source.steps, torch.Generator().manual_seed(source.seed))
        likeness = likeness_of_steps(source, self.chunk)
        if says_nothing(neighbours(likeness, self.radius)):
            source.progress.note(NO_DENSITY)
        shares = counts(likeness, self.samples, self.variety, self.radius, self.floor)
        return torch.arange(source.steps).repeat_interleave(shares)
