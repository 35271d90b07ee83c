"""Where the error arises: of the prediction at every step, and of the output of every block at a few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.evaluate.trajectory.inputs import Seen, limits, watch_inputs
from stepquant.evaluate.trajectory.time_confusion import confusion, watch_embedding
from stepquant.evaluate.twins import Twins
from stepquant.models.generate import run
from stepquant.models.hooks import after_calls, block_outputs
from stepquant.models.sampling import Sampling


@dataclass(frozen=True)
class Trace:
    """Rows for JSON: errors by step, and errors of blocks and ranges of layer inputs at the probed steps."""

    steps: list[dict[str, Any]]
    blocks: dict[str, Any]
    inputs: list[dict[str, Any]]
    times: dict[str, Any] | None = None  # confusion of the time embedding


def relative_error(out: Tensor, target: Tensor) -> float:
    """|out - target| / |target| over the whole batch."""
    out, target = out.double(), target.double()
    return float((out - target).norm() / target.norm().clamp(min=1e-30))


def cosine(out: Tensor, target: Tensor) -> float:
    """Mean over samples of the cosine between two tensors."""
    pair = out.double().flatten(1), target.double().flatten(1)
    return float(nn.functional.cosine_similarity(*pair, dim=1).mean())


def sqnr(out: Tensor, target: Tensor) -> float:
    """Signal to quantization noise in decibels, 200 at most."""
    out, target = out.double(), target.double()
    noise = (out - target).square().sum().clamp(min=1e-300)
    return float((10 * (target.square().sum().clamp(min=1e-300) / noise).log10()).clamp(max=200))


def spread_out(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices from first to last of `count`, evenly spaced."""
    wanted = min(wanted, count)
    if wanted <= 1:
        return list(range(wanted))
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def trace(twins: Twins, seeds: Sequence[int], sampling: Sampling, *, block_steps: int = 5) -> Trace:
    """Follow one batch of trajectories with both models.

    On the float trajectory both networks read the same x_t; on their own, each reads what it made itself.
    """
    source, other = twins.source, twins.other
    probed = set(spread_out(sampling.steps, block_steps))
    paths = source.blocks()
    rows: list[dict[str, Any]] = []
    table: dict[str, list[float | None]] = {path: [] for path in paths}
    states: list[tuple[Tensor, Tensor]] = []
    allowed, inputs = limits(other), [dict[str, Seen]() for _ in probed]

    with torch.no_grad(), ExitStack() as stack:
        ours = stack.enter_context(block_outputs(other.model, paths))
        theirs = stack.enter_context(block_outputs(source.model, paths))
        seen = stack.enter_context(watch_inputs(source, allowed, lambda: len(rows) in probed))
        our_times = stack.enter_context(watch_embedding(other.model))
        their_times = stack.enter_context(watch_embedding(source.model))

        def follow(call: int, arguments: dict[str, Any], target: Tensor) -> None:
            ours.clear()
            out = other.predict(arguments).to(target.device)
            rows.append(
                {
                    "step": call,
                    "t": first_number(arguments[source.family.t]),
                    "relative": relative_error(out, target),
                    "cosine": cosine(out, target),
                }
            )
            states.append((arguments[source.family.x].detach().clone(), target.detach().clone()))
            if call in probed:
                inputs[sorted(probed).index(call)].update(seen)
                for path in paths:
                    table[path].append(compare(ours.get(path), theirs.get(path)))

        stack.enter_context(after_calls(source, follow))
        run(twins.float, seeds, sampling)

    follow_own(twins, seeds, sampling, states, rows)
    kept = sorted(probed & set(range(len(rows))))
    blocks = {
        "steps": kept,
        "t": [rows[step]["t"] for step in kept],
        "rows": [{"path": path, "sqnr": values} for path, values in table.items()],
    }
    times = confusion(our_times, their_times, [row["t"] for row in rows])
    return Trace(rows, blocks, input_rows(inputs[: len(kept)], allowed), times)


def input_rows(
    inputs: Sequence[Mapping[str, Seen]], allowed: Mapping[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """A row for each layer, with a value for each probed step."""
    paths = list(inputs[0]) if inputs else []
    return [
        {
            "path": path,
            "limits": list(allowed[path]) if path in allowed else None,
            "low": [seen[path].low for seen in inputs],
            "high": [seen[path].high for seen in inputs],
            "clipped": [seen[path].clipped for seen in inputs],
        }
        for path in paths
    ]


def follow_own(
    twins: Twins,
    seeds: Sequence[int],
    sampling: Sampling,
    states: Sequence[tuple[Tensor, Tensor]],
    rows: list[dict[str, Any]],
) -> None:
    """Add to each row the distance between the quantized model's own trajectory and the float one."""

    def stray(call: int, arguments: dict[str, Any], out: Tensor) -> None:
        if call >= len(states):
            return
        x, target = states[call]
        rows[call] |= {
            "own_relative": relative_error(out.to(target.device), target),
            "own_cosine": cosine(out.to(target.device), target),
            "state_relative": relative_error(arguments[twins.other.family.x].to(x.device), x),
        }

    with torch.no_grad(), after_calls(twins.other, stray):
        run(twins.quantized, seeds, sampling)


def compare(out: Tensor | None, target: Tensor | None) -> float | None:
    """None where a fused model has no such tensor, or hands on codes instead of numbers."""
    if out is None or target is None or out.shape != target.shape:
        return None
    return sqnr(out, target)


def first_number(value: Any) -> float:
    """The time that the network was given; all samples of a batch share it."""
    return float(torch.as_tensor(value).reshape(-1)[0])
