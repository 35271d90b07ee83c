"""Gradient-aligned calibration: learnt sample weights for block reconstruction (arXiv:2602.01289).

No code was released; where the paper leaves a choice open, it is a field here. Differs from the paper:
- omega is learnt on displacements from nearest rounding: at AdaRound's start the weights are exact, and all gradients
  of the first block vanish.
- the inner rate follows from the size of the gradients, so that it fits every block.
- alignment is measured by angle (`cosine`), because raw inner products are unbounded below; raw is an option.
- d/d omega is computed from the gradients of single samples, which equals differentiating through the inner step.
- fast preset: a block is done when its soft and hard losses agree, and small blocks have more iterations than large ones.
- a block keeps rounding to nearest where that does better on held-out records.
- every record's weight is updated as often (`visits`); the paper leaves the number of updates open.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.steps import StepTable
from stepquant.fit.blocks import of_last_trajectories
from stepquant.fit.streams import Streams
from stepquant.fit.time_block import ROLES, has_time_block, reconstruct_time, time_chains
from stepquant.fit.weights import Weighing, weigh_block
from stepquant.methods.learning import StridedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class GAC(StridedMethod):
    """Block reconstruction with sample weights that align the gradients of groups of steps."""

    paper: ClassVar[dict[str, Any]] = {
        "trajectories": 256,
        "batch": 32,
        "iterations": 20000,
        "time_iterations": 20000,
        "rounding_rate": 1e-3,
        "last_rate": 1.0,
        "penalty": 0.01,
        "gap": 0.0,
        "by_size": 0.0,
    }
    time_iterations: int = Field(500, ge=0, description="for the time block")
    momentum: float = Field(
        0.95, ge=0, lt=1, description="of the moving average of activation ranges over batches"
    )
    by_step: Literal["auto", "always", "never"] = Field(
        "always",
        description="activation ranges by step, as its base has; auto: where one range would not do; never",
    )
    visits: int = Field(
        3, ge=0, description="updates of every record's weight per block; 0: uniform weights (ablation)"
    )
    meta_batch: int = Field(32, gt=0, description="training records per update")
    meta_rate: float = Field(0.1, ge=0, description="change of a record's score per update")
    inner: float = Field(
        0.1,
        gt=0,
        description="eta: size of the inner step, root mean square displacement of weights in steps",
    )
    temperature: float = Field(1.0, gt=0, description="tau of the softmax over records")
    groups: int = Field(5, ge=2, description="groups of neighbouring steps whose gradients are aligned")
    validation: float = Field(
        0.05, gt=0, lt=1, description="share of the trajectories whose records judge weights and roundings"
    )
    alignment: float = Field(
        1.0, ge=0, description="weight of the alignment term; 0: validation loss alone (ablation)"
    )
    cosine: bool = Field(True, description="align angles instead of raw gradients")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        chains = time_chains(denoiser) if has_time_block(denoiser) else None

        # Training and validation records: the same steps of the float model's trajectories in both.
        data = source.record(self.picks(source.steps))
        held = of_last_trajectories(data, self.validation)

        steps = self.by_steps(denoiser, plan, data, source)
        with (
            insert(denoiser, plan, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            reconstruct = self.reconstructing(streams, data, source)
            self.set_weight_ranges(network, source)

            # The base's time-information block, where the model has one: fitted alone, and left as it is from then on.
            if chains is not None:
                times = StepTable.of(source.times()).times.float()
                alone = self.schedule(iterations=self.time_iterations)
                reconstruct_time(network, chains, times, alone, source.seed)

            # Algorithm 1, for each block: (a) weights omega by the bi-level problem, (b) weighted reconstruction.
            apart = ROLES if chains is not None else ()
            weigh = partial(weigh_block, steps=data.steps(), settings=self.weighing(apart))
            schedule = self.schedule(without=apart)
            reconstruct(schedule, stage="weights", activations=False, held=held, weigh=weigh)

            # Activations: moving averages of their ranges by step, as the base sets them; nothing is learnt.
            self.set_input_ranges(network, data, source)
            return freeze(network)

    def weighing(self, apart: tuple[str, ...]) -> Weighing:
        return Weighing(
            visits=self.visits,
            batch=self.meta_batch,
            rate=self.meta_rate,
            inner=self.inner,
            temperature=self.temperature,
            alignment=self.alignment,
            cosine=self.cosine,
            groups=self.groups,
            without=apart,
        )
