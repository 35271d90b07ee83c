"""MixDQ: bits by what a layer does to content or to quality, and the text's first token in float (arXiv:2405.17873).

Differs from paper and code:
- the budget is what the plan gives: as many bytes of weights, and as many bits of activations, shared out anew. Products of
  attention, and activations with the scale of each token, keep what the plan says.
- losses add up: 1 - SSIM, and one over the ratio of signal to noise, each as its share of all. The paper adds SSIM and decibels.
- content and quality are one problem with these shares, which divides the budget by itself; the paper solves two and
  tries many ways to divide it. Activations of greatest loss are not kept in float beside it: that is a budget, too.
- 8 bits are taken to lose nothing, beside 4 and 2, which saves a third of the measurements.
- content is told by pictures of few steps, quality by the prediction on recorded states; the paper's models take one step.
- content layers are those that read the text and those of feed-forwards. What makes no pictures, or pictures
  below the window of SSIM, has quality alone.
- the first token is kept where recorded texts show that all begin alike, as CLIP's do.
- ranges minimise a p-norm, as in the other methods here, instead of covering everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from stepquant.artifact import Artifact
from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import spread, uniform
from stepquant.calib.record import Source, trajectory_seed
from stepquant.core.digest import value_digest
from stepquant.core.grid import Grid
from stepquant.core.knapsack import choose, shared_out
from stepquant.core.ranges import lp_search, lp_search_binned
from stepquant.fit.alone import Measure, Noise, Question, Structure, losses_alone, sizes_of
from stepquant.fit.first_token import keep_first, known_first_tokens
from stepquant.fit.lines import Lines
from stepquant.fit.ranges import set_weight_ranges
from stepquant.methods.method import RangedMethod, UnbiasedMethod
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import Place, insert
from stepquant.quant.plan import Decision, Plan
from stepquant.quant.quantizer import Port
from stepquant.quant.schemes import A8, CONTENT

FORMAT = 1  # raised when the same settings come to mean other losses
WIDTHS: dict[Port, tuple[int, ...]] = {"weight": (2, 4, 8), "input": (4, 8)}
FIRST_PICTURE = 950_000  # neither calibration nor evaluation comes here

Kept = Mapping[str, Tensor]  # layer -> what it makes of a text's first token


class MixDQ(RangedMethod, UnbiasedMethod):
    """The bits of the plan shared out anew by sensitivity, content and quality apart; a text's first token in float."""

    samples: int = Field(256, gt=0, description="calibration records")
    trajectories: int = Field(32, gt=0, description="trajectories that the records come from")
    states: int = Field(16, gt=0, description="records on which quality is measured")
    pictures: int = Field(8, gt=0, description="pictures on which content is measured")
    picture_steps: int = Field(4, gt=0, description="denoising steps of those pictures")
    first_token: bool = Field(True, description="keep what is made of a text's first token in float")
    batch: int = Field(32, gt=0, description="records per forward pass")
    p: float = Field(2.4, gt=0, le=8, description="norm that ranges minimise")

    def __call__(self, denoiser: Denoiser, plan: Plan, source: Source) -> Artifact:
        generator = torch.Generator().manual_seed(source.seed)
        data = source.record(spread(uniform(self.samples, source.steps, generator), self.trajectories))

        # The first token is an outlier, and the same in every prompt: keys and values of it are stored in float, so
        # that the range of the others is their own, and they can be integers.
        kept: Kept = {}
        if self.first_token:
            kept, plan = with_first_tokens(denoiser, plan, known_first_tokens(denoiser, data, self.batch))
            found = f"of {len(kept)} layers is kept in float" if kept else "is not the same in all texts"
            source.progress.note(f"the first token {found}")

        # Sensitivity of one site at a time, of content by the structure of pictures and of quality by noise, and the
        # bits that lose least within the budget: of weights and of activations apart.
        for port in WIDTHS:
            plan = self.shared_out(denoiser, plan, port, data, source, kept)

        steps = self.by_steps(denoiser, plan, data, source)
        with insert(denoiser, plan, **steps) as network:
            keep_first(network, kept)
            set_weight_ranges(network, partial(lp_search, p=self.p), source.progress)
            self.measure_inputs(network, data, source, partial(lp_search_binned, p=self.p), self.batch)
            return self.finish(network, data, source, self.batch)

    def shared_out(
        self, denoiser: Denoiser, plan: Plan, port: Port, data: CalibSet, source: Source, kept: Kept
    ) -> Plan:
        """`plan` with the bits of its weights, or of its activations, where they count most."""
        sites = sites_of(denoiser, plan, port, () if port == "weight" else kept)
        bits, widest = WIDTHS[port], WIDTHS[port][-1]
        if all(one.grid.bits == widest for one in sites.values() if one.grid):
            return plan
        counts = sizes_of(denoiser, sites, data)
        losses = self.losses(denoiser, plan, sites, bits[:-1], data, source, kept)
        losses |= {(place, widest): 0.0 for place in sites}
        spent = sum(one.grid.bits * counts[place] for place, one in sites.items() if one.grid)
        chosen = choose(
            [[losses[place, width] for width in bits] for place in sites],
            [[width * counts[place] for width in bits] for place in sites],
            spent,
        )
        grids = {
            place: one.grid.at(bits[index]) for (place, one), index in zip(sites.items(), chosen) if one.grid
        }
        return plan.with_grids(grids, f"bits of {port}s where they count most, as many as {plan.name} has")

    def losses(
        self,
        denoiser: Denoiser,
        plan: Plan,
        sites: Mapping[Place, Decision],
        bits: tuple[int, ...],
        data: CalibSet,
        source: Source,
        kept: Kept,
    ) -> dict[tuple[Place, int], float]:
        """Of every site at every number of bits, as a share of all that content, or quality, loses."""
        few = data.subset(list(range(min(self.states, len(data)))))
        quality: Measure = Noise(denoiser, few)
        content = {place for place, one in sites.items() if one.role in CONTENT}
        structure = self.structure(source) if content else None
        questions = [
            Question(place, bits, structure if structure and place in content else quality) for place in sites
        ]
        lines = Lines(source.cache / "alone" / f"{self.key(denoiser, plan, data)}.jsonl")
        found = losses_alone(
            denoiser, plan, questions, few, lines, source.progress, partial(keep_first, known=kept)
        )
        if structure is None:
            return shared_out(found)
        told = {key: loss for key, loss in found.items() if key[0] in content}
        return shared_out(told) | shared_out({key: loss for key, loss in found.items() if key not in told})

    def structure(self, source: Source) -> Structure | None:
        """What content is told by; None where there are no pictures that could tell."""
        asked = source.sampling
        sampling = replace(asked, steps=min(self.picture_steps, asked.steps))
        seeds = [trajectory_seed(source.seed, FIRST_PICTURE + i) for i in range(self.pictures)]
        found = Structure(source.pipeline, seeds, sampling)
        if found.tells:
            return found
        source.progress.note("there are no pictures whose structure could tell content: quality alone counts")
        return None

    def key(self, denoiser: Denoiser, plan: Plan, data: CalibSet) -> str:
        """The name of everything that decides the losses."""
        records = [[shard.parent.name, shard.name] for shard in data.shards], data.index
        return value_digest([FORMAT, denoiser.digest(), plan.to_json(), *records, self.model_dump()])[:32]


def with_first_tokens(denoiser: Denoiser, plan: Plan, known: Kept) -> tuple[dict[str, Tensor], Plan]:
    """What is known of those layers whose weights the plan quantizes, and the plan with integers for their other tokens."""
    decided = plan.resolve(denoiser)
    kept = {path: value for path, value in known.items() if decided[path, "weight"].grid}
    if not any(one.grid for (_, port), one in decided.items() if port == "input"):
        return kept, plan
    grids: dict[Place, Grid] = {(path, "input"): A8 for path in kept}
    return kept, plan.with_grids(grids, "the text without its first token, which is its outlier")


def sites_of(denoiser: Denoiser, plan: Plan, port: str, without: Collection[str]) -> dict[Place, Decision]:
    """The weights, or the inputs with a range, that the plan quantizes; not of all layers."""
    return {
        place: one
        for place, one in plan.resolve(denoiser).items()
        if place[0] not in without
        and one.port == port
        and one.grid is not None
        and one.grid.granularity != "token"
    }
