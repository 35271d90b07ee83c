"""TDQ: scales of activations as a learnt function of t, stored for every t of the sampler (arXiv:2306.02316).

Differs from the paper:
- after training, as its second setting: each network learns to round its own activation with the least squared error, not
  to make the loss of a model that is trained on.
- activations are seen behind quantized weights, each by its histogram at every recorded step, behind inputs in float.
- a zero point, where the grid has one, is the same at every t: the range shrinks and grows around zero.
- t is scaled so that the greatest one of the sampler is 1000, as samplers of flows and sigmas have others.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError
from stepquant.fit.over_time import features, learn_scales, seen_by_step, set_codebooks
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan


class TDQ(UnbiasedMethod):
    """Temporal dynamic quantization: a network tells the scale of each activation from t, and is tabled."""

    samples: int = Field(512, gt=0, description="calibration records")
    trajectories: int = Field(32, gt=0, description="trajectories that the records come from")
    iterations: int = Field(300, ge=0, description="for each network; 0: one scale for all steps")
    rate: float = Field(0.003, gt=0, le=1, description="Adam's rate at the beginning of its cosine")
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges of weights, and first scales, minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        if not plan.has_ranges(denoiser):
            raise MethodError(
                f"plan '{plan.name}' gives no activation a range that could follow t",
                fix="choose a scheme with ranges, as w8a8, or a method that needs none, as gptq",
            )
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))
        steps = StepTable.of(source.times())

        with insert(denoiser, plan, steps=steps) as network:
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

            # Section 4.2: s(t) = softplus(MLP(enc(t))), which begins as one scale for all t; a step without records
            # gets what the function has for it.
            seen, known = (
                seen_by_step(network, data, steps, self.batch, source.progress),
                features(steps.times),
            )
            learn = partial(learn_scales, p=self.p, iterations=self.iterations, rate=self.rate)
            for quantizer in source.progress.track(list(seen), "scales over t", len(seen)):
                calls = seen.pop(quantizer)
                scales, zero_point = learn(calls, quantizer.grid, known, generator=generator)
                # Section 4.3: the networks are done with; what they say of every t is stored.
                for row, scale in enumerate(scales):
                    quantizer.set_range(scale, zero_point, row)
                set_codebooks(quantizer, calls)
            return self.finish(network, data, source, self.batch)
