"""EfficientDM: adapters that are rounded with the weights, distilled from the float model's predictions (arXiv:2310.03270).

Differs from paper and code:
- states come from the float model's trajectories, recorded once and drawn in random order; the code walks along a trajectory,
  of new noise in every epoch.
- rates are those of Adam on a cosine; zero points stay where ranges have set them. Scales are learnt as factors: the published
  rates of scales of weights are turned into relative ones for scales of 0.01.
- records that are held out judge what is learnt: it is given up where it helps nothing.
- the fast preset learns adapters at fifty times the rate, for it has an eightieth of the iterations.
- `guided` learns by what the sampler reads as well; the paper learns by every prediction; `along` counts
  errors more that shrink a prediction.
- grids come from the plan; the code has 8 bits for the first and the last layer, and no float but the time embedding.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.losses import BlockLoss
from stepquant.fit.streams import Streams
from stepquant.methods.learning import DistillingMethod, say_few
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class EfficientDM(DistillingMethod):
    """Low-rank adapters merge into weights before these are rounded (QALoRA); scales by step; predictions are distilled."""

    paper: ClassVar[dict[str, Any]] = {
        "samples": 16000,
        "trajectories": 160,
        "iterations": 16000,
        "batch": 4,
        "adapter_rate": 4e-4,
        "weight_scale_rate": 1e-4,
        "step_rate": 5e-4,
    }
    samples: int = Field(512, ge=16, description="calibration records")
    trajectories: int = Field(64, gt=0, description="trajectories that the records come from")
    iterations: int = Field(200, ge=0, description="of the network")
    rank: int = Field(32, gt=0, le=1024, description="r: of the adapters, at most the width of their layer")
    by_step: Literal["auto", "always", "never"] = Field(
        "always", description="activation ranges by step (TALSQ); auto: where one range would not do; never"
    )
    adapter_rate: float = Field(
        0.02, gt=0, le=1, description="Adam's rate for adapters, times the scales of their weight"
    )
    weight_scale_rate: float = Field(1e-3, ge=0, description="of the scales of weights, relative to each")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        steps = self.by_steps(denoiser, plan, data, source)
        with (
            insert(denoiser, plan, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            # Ranges that all begins with; of activations those of every step, or interval of steps (TALSQ).
            self.set_weight_ranges(network, source)
            self.set_input_ranges(network, data, source)

            # QALoRA: Y = Q(X) Q(W + B A), by the squared error of the predicted noise. An adapter learns at a rate in
            # proportion to the scale of its weight, so that it reaches the next integer in every layer as soon.
            schedule = self.through_rounding(
                rank=self.rank,
                weight_rate=self.adapter_rate,
                weight_scale_rate=self.weight_scale_rate,
                scale_rate=self.step_rate,
                loss=BlockLoss(along=self.along),
            )
            say_few(data, source)
            self.distilling(streams, data, source)(schedule, stage="distilled")
            return freeze(network)
