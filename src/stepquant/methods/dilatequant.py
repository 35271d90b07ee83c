"""DilateQuant: weights dilated along unsaturated channels, tables of ranges over the steps, blocks distilled (arXiv:2409.14307).

Differs from the paper:
- weights are dilated up to the range that their grid has, which minimises a p-norm and may cut the greatest off; the paper's
  range is that of the greatest and the least.
- factors of channels multiply what a layer reads; they are not folded into the layer before.
- products of attention have one range for each operand, not one for each head.
- zero points stay where ranges have set them. Scales of activations are learnt as factors, weights in units of their scales,
  so that one rate fits all layers.
- grids come from the plan: most schemes keep what depends on t alone in float.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.errors import MethodError
from stepquant.fit.dilate import dilate
from stepquant.fit.streams import Streams
from stepquant.methods.learning import LearningMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class DilateQuant(LearningMethod):
    """Weights grow where their range has room and activations shrink; weights and scales by step are distilled by block."""

    paper: ClassVar[dict[str, Any]] = {"samples": 5120, "iterations": 5000, "batch": 32, "step_rate": 1e-4}
    samples: int = Field(512, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    dilation: bool = Field(
        True, description="dilate weights along channels that leave their range unused (WD)"
    )
    by_step: Literal["auto", "always", "never"] = Field(
        "always", description="activation ranges by step (TPQ); auto: where one range would not do; never"
    )
    weight_rate: float = Field(0.01, gt=0, le=1, description="Adam's rate for weights, in their scales (BKD)")
    step_rate: float = Field(
        2e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        if not plan.has_ranges(denoiser):
            raise MethodError(
                f"plan '{plan.name}' gives no activation a range that could shrink",
                fix="choose a scheme with ranges, as w4a4, or a method that needs none, as gptq",
            )
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        steps = self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            # WD: s_k = min_o of what the range of output o holds over the greatest weight of channel k, at least 1; a
            # channel with a saturated weight keeps s = 1. X / s meets s W, on the scales that W has.
            self.set_weight_ranges(network, source)
            if self.dilation:
                found = dilate(network.layers)
                mean = sum(found.values()) / max(len(found), 1)
                source.progress.note(
                    f"{len(found)} layers are dilated, their channels by {mean:.2f} on average"
                )

            # TPQ: a range for every step, or interval of steps; a batch of many steps reads many of them.
            self.set_input_ranges(network, data, source)

            # BKD: weights and scales of a block together, behind the blocks already distilled.
            with Streams(network, data, source.cache, budget=source.memory) as streams:
                schedule = self.through_rounding(weight_rate=self.weight_rate, scale_rate=self.step_rate)
                self.reconstructing(streams, data, source)(schedule, stage="distilled", activations=True)
            return freeze(network)
