"""Q-Diffusion: calibration at equal distances along the trajectory, split shortcuts, two stages (arXiv:2302.04304).

Differs from the released code:
- the calibration set is recorded here, x with its t and every guidance branch; the code expects a file of them.
- grids come from the plan, so that layers with 8-bit weights or float inputs are its choice.
- activation steps are learnt as factors of their start, so that one rate fits every site; published rates are absolute.
- fast preset: a block is done when its soft and hard losses agree, and small blocks have more iterations than large ones.
- a block keeps rounding to nearest where that does better on held-out records.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.record import Source
from stepquant.core.losses import BlockLoss
from stepquant.fit.streams import Streams
from stepquant.methods.learning import StridedMethod
from stepquant.methods.method import split_here
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class QDiffusion(StridedMethod):
    """Time-step-aware calibration and shortcut-splitting quantization."""

    paper: ClassVar[dict[str, Any]] = {
        "trajectories": 256,
        "batch": 32,
        "iterations": 20000,
        "step_iterations": 5000,
        "rounding_rate": 1e-3,
        "last_rate": 1.0,
        "penalty": 0.01,
        "gap": 0.0,
        "by_size": 0.0,
        "step_rate": 4e-4,
    }
    split: bool = Field(True, description="quantize the two halves of a skip concatenation apart")
    step_iterations: int = Field(40, ge=0, description="per block, for activation steps")
    step_rate: float = Field(
        1e-3, ge=0, description="Adam's rate for activation steps, relative to each step"
    )
    momentum: float = Field(
        0.95, ge=0, lt=1, description="of the moving average of activation ranges over batches"
    )

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        # Algorithm 1: intermediate inputs at fixed intervals over all time steps, both guidance branches.
        data = source.record(self.picks(source.steps))

        # Eq. 9 and 10: the halves of a concatenated input have their own weight and activation quantizers.
        split = split_here(self.split, "split" in self.model_fields_set, denoiser, source)
        steps = self.by_steps(denoiser, plan, data, source, split)
        with (
            insert(denoiser, plan, split=split, **steps) as network,
            Streams(network, data, source.cache, budget=source.memory) as streams,
        ):
            reconstruct = self.reconstructing(streams, data, source)
            self.set_weight_ranges(network, source)

            # First stage: roundings of the weights, block by block, while activations stay float.
            reconstruct(self.schedule(), stage="weights", activations=False)

            # Second stage: ranges of the activations as moving averages, then their steps by gradient.
            self.set_input_ranges(network, data, source)
            schedule = self.schedule(
                iterations=self.step_iterations,
                rounding_rate=0,
                scale_rate=self.step_rate,
                last=0.0,
                loss=BlockLoss(self.p),
            )
            reconstruct(schedule, stage="steps", activations=True)
            return freeze(network)
