"""QuEST: weights of the layers that carry the time, then of attentions and feed-forwards, with all scales by step (arXiv:2402.03666).

Differs from paper and code:
- the layers below it are rounded by block reconstruction as in `brecq`, where the code takes a checkpoint of Q-Diffusion;
  weights that are learnt begin with these integers.
- states of all steps are drawn in random order; the code learns at one step after the other, for 20 rounds.
- rates are in units of the scales, so that one fits all layers, and published ones are turned into these for scales of 0.01 of
  weights and 0.1 of activations; biases stay, and zero points.
- records that are held out judge each of both parts: it is given up where it helps nothing.
- `guided` learns by what the sampler reads as well; the paper learns by every prediction; `along` counts
  errors more that shrink a prediction.
- `tuned=all` goes beyond the paper: convolutions, most weights of a U-Net, are tuned too, and `weight_scale_rate` tunes scales.
- grids come from the plan: most schemes keep inputs of what depends on t in float, so that it has weights alone to learn.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.losses import BlockLoss
from stepquant.errors import MethodError
from stepquant.fit.streams import Streams
from stepquant.methods.learning import BlockMethod, DistillingMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import TIMES

SENSITIVE = ("q", "k", "v", "q_added", "k_added", "v_added", "qkv_ff_in", "ff_in", "ff_out")


class QuEST(BlockMethod, DistillingMethod):
    """Selected layers are fine-tuned through their rounding, first those of the time, and scales of activations by step."""

    paper: ClassVar[dict[str, Any]] = {
        "samples": 1024,
        "batch": 4,
        "iterations": 20000,
        "rounding_rate": 1e-3,
        "last_rate": 1.0,
        "penalty": 0.01,
        "gap": 0.0,
        "by_size": 0.0,
        "time_iterations": 24000,
        "tuning_iterations": 6400,
        "weight_rate": 1e-3,
        "step_rate": 1e-3,
    }
    samples: int = Field(512, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    by_step: Literal["auto", "always", "never"] = Field(
        "always", description="activation ranges by step; auto: where one range would not do; never"
    )
    time_iterations: int = Field(40, ge=0, description="of the network, for layers that carry the time")
    tuning_iterations: int = Field(
        160, ge=0, description="of the network, for attentions, feed-forwards and scales"
    )
    tuned: Literal["selected", "all"] = Field(
        "selected",
        description="which weights are tuned: attentions and feed-forwards; or those of all layers",
    )
    weight_rate: float = Field(0.01, gt=0, le=1, description="Adam's rate for weights, in their scales")
    weight_scale_rate: float = Field(0.0, ge=0, description="of the scales of weights, relative to each")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        if self.tuned == "selected":
            self.check_has_sensitive(denoiser, plan)
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        steps = self.by_steps(denoiser, plan, data, source)
        with (
            insert(denoiser, plan, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            distilling = self.distilling(streams, data, source)
            self.set_weight_ranges(network, source)
            self.reconstructing(streams, data, source)(self.schedule(), stage="weights", activations=False)
            self.set_input_ranges(network, data, source)

            # Layers that retain the time first, by what they return and by what the network predicts.
            timed = self.through_rounding(
                iterations=self.time_iterations,
                weight_rate=self.weight_rate,
                only=TIMES,
                watch=TIMES,
                loss=BlockLoss(layers=1.0, along=self.along),
            )
            distilling(timed, stage="time")

            # Then layers that few bits hurt most, and the scales of all activations at every step, by the prediction.
            tuned = self.through_rounding(
                iterations=self.tuning_iterations,
                weight_rate=self.weight_rate,
                weight_scale_rate=self.weight_scale_rate,
                scale_rate=self.step_rate,
                only=SENSITIVE if self.tuned == "selected" else (),
                loss=BlockLoss(along=self.along),
            )
            distilling(tuned, stage="tuned")
            return freeze(network)

    def check_has_sensitive(self, denoiser: Denoiser, plan: Plan) -> None:
        decided, roles = plan.resolve(denoiser), denoiser.sites()
        if not any(role in SENSITIVE and decided[path, "weight"].grid for path, role in roles.items()):
            raise MethodError(
                "there is no layer of an attention or a feed-forward to fine-tune",
                where=type(denoiser.model).__name__,
                got=f"plan '{plan.name}' on {len(roles)} layers",
                fix="tune what there is with --set tuned=all, or choose another method, as brecq",
            )
