"""DGQ: outliers kept by groups of channels or of pixels, attention to words by powers of two, the start token apart (arXiv:2501.04304).

Differs from paper and code:
- groups of pixels have one pixel each: every token has a scale of its own as it comes, symmetric, which needs no table.
- the scale of a group of channels multiplies its channels, and its weights are divided by it before they are rounded, so that
  one product of integers is left; groups share a zero point, and are those of all steps. Ranges belong to the steps.
- convolutions, which the code groups over their columns, and operands of attention have one range for each group of steps.
- the scale of attention to words is the greatest of each query, where the code has one for the batch.
- the start token is what all texts begin with; where they do not begin alike, nothing is apart.
- weights are rounded to nearest; the paper begins with weights that were reconstructed, and leaves them as they are.
- models without text take the first part alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

from pydantic import Field

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.errors import MethodError
from stepquant.fit.channels import with_ranges
from stepquant.fit.first_token import known_first_tokens
from stepquant.fit.outliers import ends_of_inputs, factors_of, groups_of
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import RangedMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Decision, Plan
from stepquant.quant.schemes import ENDS, TEXTS, TIMES

WITHOUT = (*TIMES, *TEXTS, *ENDS)
POWERS = Grid.parse("uint8/log")
PIXELS = "outliers lie in pixels, each of which has its own scale"
WORDS = "most words have a small share of the attention, and the start token the rest"


class DGQ(RangedMethod, UnbiasedMethod):
    """Linears with a scale for each group of channels, or for each pixel; attention to words by powers of two."""

    samples: int = Field(256, ge=16, description="calibration records, as many of every step")
    groups: int = Field(8, gt=0, description="K: groups of channels; 1: no channel is multiplied")
    text: bool = Field(
        True, description="attention to words by powers of two, and that to the start token in float"
    )
    by_step: Literal["auto", "always", "never"] = Field(
        "always", description="activation ranges by step: always; auto, where one range would not do; never"
    )
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        with insert(denoiser, plan) as network:
            with_ranges(network, WITHOUT)  # a model or a scheme without any is refused
        data = source.record(every(math.ceil(self.samples / source.steps), range(source.steps)))

        # Outliers lie where ends differ most, d* = argmax_d D_d (Eq. 4): over channels, or over pixels.
        with insert(denoiser, plan) as network:
            layers = with_ranges(network, WITHOUT)
            found = ends_of_inputs(network, layers, data, self.batch, source.progress)
        decided = plan.resolve(denoiser)
        pixels = [path for path, one in found.items() if one.in_tokens and by_rows(decided[path, "weight"])]
        source.progress.note(f"outliers of {len(pixels)} of {len(found)} linears lie in pixels")
        plan = plan.with_grids({(path, "input"): by_pixel(decided[path, "input"]) for path in pixels}, PIXELS)

        # Attention scores of words are s 2^-q; most pixels look at the start token, and its scores stay as they are.
        words = self.readers_of_text(denoiser, plan, data, source)
        plan = plan.with_grids({(path, "probabilities"): POWERS for path in words}, WORDS)

        with insert(denoiser, plan, **self.by_steps(denoiser, plan, data, source)) as network:
            for path in words:
                network.products[path].first = True

            # K-means of the channels by their ends; each group has a scale of its own.
            for path in [path for path in found if path not in pixels]:
                labels = groups_of(found[path].of(path), self.groups)
                if len(labels.unique()) > 1:
                    network.layers[path].divide(factors_of(found[path].of(path), labels), None)
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)
            self.measure_inputs(network, data, source, partial(lp_search_binned, p=self.p), self.batch)
            return self.finish(network, data, source, self.batch)

    def readers_of_text(self, denoiser: Denoiser, plan: Plan, data: CalibSet, source: Source) -> list[str]:
        """The attentions to texts that all begin with one token, of those that the plan quantizes."""
        if not self.text:
            return []
        decided = plan.resolve(denoiser)
        known = known_first_tokens(denoiser, data, self.batch)
        found = [
            path
            for path in denoiser.products()
            if decided[path, "probabilities"].grid and any(one.startswith(f"{path}.") for one in known)
        ]
        if found:
            return found
        if "text" in self.model_fields_set:
            raise MethodError(
                "no attention reads texts that all begin with the same token",
                got=f"{len(denoiser.products())} attentions, and {len(known)} layers with a known first token",
                expected="cross-attention to texts with a start token, as CLIP's, quantized by the scheme",
                fix="leave --set text=true out",
            )
        source.progress.note("no attention reads texts that begin with the same token: groups alone")
        return []


def by_rows(decision: Decision) -> bool:
    """Whether such weights go with a scale for each row: those in groups do not."""
    return decision.grid is not None and not decision.grid.group


def by_pixel(decision: Decision) -> Grid:
    """As many bits, with a scale for each row."""
    assert decision.grid is not None, "it has a range"
    return Grid(decision.grid.bits, granularity="token")
