"""Static quantization of video transformers: a range for every step, channels balanced for all of them (arXiv:2502.15077).

Differs from the paper, of which no code is known:
- weights are stored once, so that factors of the channels are those of all steps: ranges alone belong to a step.
- factors are absorbed by what comes before wherever a layer of the same block makes the shift and scale of a norm; elsewhere
  they multiply the input when it is quantized.
- ranges minimise a p-norm, as in the other methods here, instead of covering everything.
- convolutions and products of attention have ranges by step, too; what reads t or the text stays as the plan has it.
- it takes networks without frames as well.
"""

from __future__ import annotations

import math
from functools import partial

from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.core.steps import StepTable
from stepquant.fit.channels import balance_behind_norms, balance_channels, greatest_inputs, with_ranges
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.methods.method import UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import ENDS, TEXTS, TIMES

WITHOUT = (*TIMES, *TEXTS, *ENDS)


class StaticVideo(UnbiasedMethod):
    """Nothing is found as it comes: a range for every activation and step, channels balanced where it costs nothing."""

    samples: int = Field(512, ge=16, description="calibration records, as many of every step")
    alpha: float = Field(
        0.5, ge=0, le=1, description="how much of the unevenness of channels moves from inputs into weights"
    )
    batch: int = Field(32, gt=0, description="records per forward pass")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the moving average of ranges over batches")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        with insert(denoiser, plan) as network:
            with_ranges(network, WITHOUT)

        # Calibration data of each step by itself.
        data = source.record(every(math.ceil(self.samples / source.steps), range(source.steps)))
        steps = StepTable.of(source.times())
        with insert(denoiser, plan, steps=steps) as network:
            # Smoothing: max |x|^alpha / max |w|^(1 - alpha) of each channel over all steps, from inputs into weights.
            layers = with_ranges(network, WITHOUT)
            most = greatest_inputs(network, layers, data, self.batch, source.progress, of_all=True)
            folded = balance_behind_norms(network, layers, most, self.alpha)
            balance_channels({p: one for p, one in layers.items() if p not in folded}, most, self.alpha)
            source.progress.note(f"factors of {len(folded)} of {len(layers)} linears cost nothing")

            # Weights by the channel; activations by the tensor, one range for each step.
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)
            set_input_ranges(
                network,
                data,
                partial(lp_search_binned, p=self.p),
                every_step=data,
                batch=self.batch,
                momentum=self.momentum,
                progress=source.progress,
            )
            return self.finish(network, data, source, self.batch)
