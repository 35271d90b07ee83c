"""APQ-DM: steps in groups that share a range, found by gradients; records where groups are uncertain (arXiv:2305.18723).

Differs from paper and code:
- a step errs as each of its groups does, by their weights; in the paper it errs as the weighted mean of what they make of a
  number, in which errors cancel, although a single group is what runs.
- each activation is searched by itself, on histograms behind quantized weights; the code follows the network's output.
- groups are of steps. The code has groups of channels, whose ranges it mixes into one for each step.
- the first records are of every step alike, the further ones of those steps where the groups of all activations are least
  certain; the code draws all of them in that way, in small batches between the steps of the search.
- that the choice stays near the distribution of all steps is a price of each record at a step, as in the code; the
  paper has a distance between features.
- ranges of weights, and those of groups in the end, minimise a p-norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from stepquant.artifact import Artifact
from stepquant.calib.pick import Pick, every, spread
from stepquant.calib.record import Source
from stepquant.core.ranges import lp_search
from stepquant.core.steps import StepTable
from stepquant.errors import MethodError
from stepquant.fit.over_time import Seen, seen_by_step, set_codebooks
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.step_groups import most_uncertain, search_groups, shared_ranges, uncertainty
from stepquant.methods.method import UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Plan
from stepquant.quant.quantizer import Quantizer


class APQDM(UnbiasedMethod):
    """Each activation has a few ranges, and the search says which steps share one; it asks for records where it doubts."""

    samples: int = Field(
        256, ge=16, description="calibration records of the first search, as many of each step"
    )
    chosen: int = Field(
        128, ge=0, description="further records, of steps where the first search is uncertain"
    )
    trajectories: int = Field(32, gt=0, description="trajectories that the further records come from")
    groups: int = Field(8, gt=0, description="of steps, for each activation")
    iterations: int = Field(60, ge=0, description="of the search for each activation")
    rate: float = Field(0.05, gt=0, le=1, description="Adam's rate for the weights of groups")
    sharpness: float = Field(0.01, ge=0, description="price of entropy, which makes steps decide")
    even: float = Field(
        0.05, ge=0, description="how much further records at a step count against more of them"
    )
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        if not plan.has_ranges(denoiser):
            raise MethodError(
                f"plan '{plan.name}' gives no activation a range that steps could share",
                fix="choose a scheme with ranges, as w8a8, or a method that needs none, as gptq",
            )
        first = every(math.ceil(self.samples / source.steps), range(source.steps))
        data, steps = source.record(first), StepTable.of(source.times())

        with insert(denoiser, plan, steps=steps) as network:
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)

            # Section 3.2: importance weights of groups for every step, found by differentiable search.
            seen = seen_by_step(network, data, steps, self.batch, source.progress)
            found = self.searched(seen, steps, source)

            # Section 3.3: structural risk. Where the choice of a group is uncertain records say most, as long as
            # they stay near the distribution of all steps.
            if self.chosen:
                doubts = torch.stack([uncertainty(weights) for weights in found.values()]).mean(0)
                more = source.record(self.further(doubts, steps, source))
                again = seen_by_step(network, more, steps, self.batch, source.progress)
                seen = {quantizer: [*calls, *again[quantizer]] for quantizer, calls in seen.items()}
                found = self.searched(seen, steps, source)

            # Each step takes its heaviest group, whose range serves all steps of it.
            for quantizer, weights in found.items():
                ranges = shared_ranges(seen[quantizer], quantizer.grid, weights, self.p)
                for row, (scale, zero_point) in enumerate(zip(*ranges)):
                    quantizer.set_range(scale, zero_point, row)
                set_codebooks(quantizer, seen[quantizer])
            return self.finish(network, data, source, self.batch)

    def searched(
        self, seen: Mapping[Quantizer, Sequence[Seen]], steps: StepTable, source: Source
    ) -> dict[Quantizer, Tensor]:
        """How much each step belongs to each group, for every activation."""
        search = partial(
            search_groups,
            steps=steps.groups,
            groups=self.groups,
            p=self.p,
            iterations=self.iterations,
            rate=self.rate,
            sharpness=self.sharpness,
        )
        every_one = source.progress.track(seen.items(), "groups of steps", len(seen))
        return {quantizer: search(calls, quantizer.grid) for quantizer, calls in every_one}

    def further(self, doubts: Tensor, table: StepTable, source: Source) -> tuple[Pick, ...]:
        """Records at the steps of uncertain rows, of trajectories that gave none yet."""
        rows = table.rows_of(source.times())
        steps = [int((rows == row).nonzero()[0]) for row in most_uncertain(doubts, self.chosen, self.even)]
        begun = math.ceil(self.samples / source.steps)
        return tuple(
            one._replace(trajectory=one.trajectory + begun)
            for one in spread(torch.tensor(steps), self.trajectories)
        )
