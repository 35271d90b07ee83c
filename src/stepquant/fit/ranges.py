"""Set the ranges of inserted quantizers from weights and from calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.core.affine import quantize, scale_and_zero, to_groups
from stepquant.core.freed import trim
from stepquant.core.levels import byte_counts
from stepquant.core.policy import FloatSteps
from stepquant.core.ranges import Search, SlicedSearch, ema
from stepquant.core.slices import Slices
from stepquant.core.steps import StepTable
from stepquant.errors import CalibrationError, MethodError
from stepquant.progress import Progress, Silent
from stepquant.quant.insert import Inserted
from stepquant.quant.quantizer import Quantizer


def set_weight_ranges(network: Inserted, search: Search, progress: Progress | None = None) -> None:
    """The range of every weight, from the weight alone."""
    layers = list(network.weighted().values())
    trim()  # what recording has left
    for layer in (progress or Silent()).track(layers, "weight ranges", len(layers)):
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        quantizer.fit(to_groups(layer.weight.detach().float(), quantizer.grid), search)


def set_input_ranges(
    network: Inserted,
    data: CalibSet,
    search: SlicedSearch,
    *,
    every_step: CalibSet | None = None,
    batch: int = 64,
    momentum: float = 0.9,
    progress: Progress | None = None,
) -> None:
    """The range of every activation, as moving average over batches.

    While a batch runs, weights and all earlier activations are already quantized: each range fits what it will see.
    Where activations have a range for every step, each one comes from those of the records `every_step` that are of
    its own steps, once all that have one range are quantized. Records of steps in float decide nothing.
    """
    quantizers, progress = network.ranged(), progress or Silent()
    if not quantizers:
        return
    network.switch(weights=True, inputs=True)
    stepped = [q for q in quantizers if q.has_rows]
    alone = [q for q in quantizers if not q.has_rows]
    spared = network.plan.float_steps
    for quantizer in stepped:
        quantizer.enabled = False
    if alone:
        mine = in_integers(data, spared) or data
        observe_part(network, mine, search, alone, None, batch, momentum, progress)
    network.switch(weights=True, inputs=True)
    if stepped:
        for row, records in by_row(every_step or data, stepped[0].table):
            mine = in_integers(records, spared) or records
            observe_part(network, mine, search, stepped, row, batch, momentum, progress)
    unseen = [q for q in quantizers if not q.is_set]
    if unseen:
        raise MethodError(
            f"'{unseen[0].site}' never ran during calibration",
            got=f"{len(unseen)} quantizers without a range",
            fix="keep these layers in float with a plan rule",
        )


def in_integers(data: CalibSet, spared: FloatSteps | None) -> CalibSet | None:
    """The records whose activations are rounded; None where there are none."""
    if spared is None:
        return data
    inner = data.rounded(spared)
    return data.subset(inner) if inner else None


def by_row(data: CalibSet, table: StepTable) -> Iterator[tuple[int, CalibSet]]:
    """The records of every row of a per-step table."""
    times = torch.cat([records.arguments[data.t].reshape(-1) for records in data.batches(256)])
    rows = table.rows_of(times)
    for row in range(table.groups):
        mine = (rows == row).nonzero().flatten().tolist()
        if not mine:
            known = table.times[table.rows == row]
            raise CalibrationError(
                "a range for some steps has no records to come from",
                got=f"none at t = {', '.join(f'{t:g}' for t in known[:4].tolist())}",
                fix="record every group of steps, or make fewer groups",
            )
        yield row, data.subset(mine)


def observe_part(
    network: Inserted,
    data: CalibSet,
    search: SlicedSearch,
    quantizers: Sequence[Quantizer],
    row: int | None,
    batch: int,
    momentum: float,
    progress: Progress,
) -> None:
    """Set one range of every quantizer."""
    lows: dict[Quantizer, Tensor] = {}
    highs: dict[Quantizer, Tensor] = {}
    counts: dict[Quantizer, Tensor] = {}

    def observe(quantizer: Quantizer, values: Slices) -> None:
        if not all(end.isfinite() for end in values.ends):
            raise CalibrationError(
                f"activations are not finite at '{quantizer.site}'",
                fix="keep this layer, or the one before it, in float with a plan rule",
            )
        grid = quantizer.grid_at(row)
        low, high = search(values, grid)
        lows[quantizer] = ema(lows.get(quantizer), low, momentum)
        highs[quantizer] = ema(highs.get(quantizer), high, momentum)
        quantizer.set_range(*scale_and_zero(lows[quantizer], highs[quantizer], grid), row)
        if grid.codebook:
            counts[quantizer] = ema(counts.get(quantizer), counts_of(quantizer, values), momentum)
            quantizer.set_codebook(counts[quantizer], row)

    what = "activation ranges" if row is None else f"activation ranges {row + 1}"
    observe_all(network, data, quantizers, observe, batch, progress, what)


def counts_of(quantizer: Quantizer, values: Slices) -> Tensor:
    """How often each byte occurs of the range that these samples read."""
    scale, zero_point = quantizer.present()
    grid = quantizer.grid
    return torch.stack([byte_counts(quantize(x, scale, zero_point, grid)) for x in values]).sum(0).double()


def observe_all(network, data, quantizers, observe, batch: int, progress: Progress, what: str) -> None:  # type: ignore[no-untyped-def]
    for quantizer in quantizers:
        quantizer.observer = observe
    inserted = (*network.layers.values(), *network.products.values())
    handles = [one.register_forward_hook(lambda *_: trim()) for one in inserted]
    try:
        with torch.no_grad():
            total = -(-len(data) // batch)
            for records in progress.track(data.batches(batch), what, total):
                network.denoiser.predict(records.arguments)
    finally:
        for handle in handles:
            handle.remove()
        for quantizer in quantizers:
            quantizer.observer = None
