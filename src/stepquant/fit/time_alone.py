"""Layers that t alone decides, in any model: found by changing its arguments, and tabled by what they return for every t.

Where t enters through modulation that nothing else enters, these are the modulations of all blocks; where a class or a
text enters it too, what is left is the embedding of t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calib.calibset import CalibSet
from stepquant.errors import MethodError
from stepquant.models.denoiser import Denoiser
from stepquant.models.observe import changed, later, watch

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class TimeAlone:
    """What layers return for every t."""

    values: Tensor  # (times, columns)
    shapes: Mapping[
        str, tuple[int, ...]
    ]  # of a layer's row, in the order of columns; () where nobody reads it


def table_time(denoiser: Denoiser, data: CalibSet, times: Tensor) -> TimeAlone:
    """The table of the layers that t alone decides; a model without any is an error."""
    two = at_time(data.take(range(2)).arguments, data.t, times[0])
    outputs = decided_by_time(denoiser, two, data.t)
    if not outputs:
        raise MethodError(
            "no table over t can stand in for any layer of this model",
            where=type(denoiser.model).__name__,
            got="no linear that reads t and nothing else",
            fix="choose a method that does not treat the time apart",
        )
    idle = unread(denoiser, two, outputs)
    shapes = {path: () if path in idle else tuple(outputs[path].shape[1:]) for path in sorted(outputs)}
    one = data.take([0]).arguments
    rows = [row_of(denoiser, at_time(one, data.t, t), [p for p in shapes if shapes[p]]) for t in times]
    return TimeAlone(torch.stack(rows), shapes)


def at_time(arguments: Arguments, name: str, t: Tensor) -> dict[str, Any]:
    given = arguments[name]
    return {**arguments, name: t.to(given).expand_as(given).clone()}


def decided_by_time(denoiser: Denoiser, arguments: Arguments, name: str) -> dict[str, Tensor]:
    """What linears return that read t alone, in the order of their calls; `arguments` are of two samples at one t."""
    _, before = watch(denoiser, arguments)
    _, after = watch(denoiser, {**arguments, name: later(arguments[name])})
    found = [
        path
        for path in before
        if path in denoiser.sites()
        and isinstance(denoiser.model.get_submodule(path), nn.Linear)
        and len(set(before[path])) == 1
        and before[path] != after.get(path)
    ]
    for key in arguments:
        if key not in (name, *denoiser.family.shared):
            with suppress(IndexError):  # a place in a table that has no other
                _, now = watch(denoiser, {**arguments, key: changed(arguments[key])})
                found = [path for path in found if before[path] == now.get(path)]
    outputs = returned(denoiser, arguments, found)
    return {path: out for path, out in outputs.items() if has_rows(out)}


def has_row_for_each(denoiser: Denoiser, data: CalibSet, paths: Sequence[str]) -> bool:
    """Whether what these layers return has a row for each sample, and none for each frame."""
    outputs = returned(denoiser, data.take(range(2)).arguments, paths)
    return all(len(out) == 2 for out in outputs.values())


def has_rows(out: Tensor) -> bool:
    """One for each of the two samples, alike."""
    return out.ndim > 1 and len(out) == 2 and torch.allclose(out[0], out[1], rtol=1e-3, atol=1e-5)


def unread(denoiser: Denoiser, arguments: Arguments, outputs: Mapping[str, Tensor]) -> set[str]:
    """Layers whose output reaches the prediction through others of them alone: it may be anything."""
    exact = predicted(denoiser, arguments, outputs)

    def search(paths: Sequence[str]) -> set[str]:
        if not paths:
            return set()
        other = {**outputs, **{path: torch.zeros_like(outputs[path]) for path in paths}}
        if torch.equal(predicted(denoiser, arguments, other), exact):
            return set(paths)
        middle = len(paths) // 2
        return search(paths[:middle]) | search(paths[middle:]) if middle else set()

    # What modulates is read where it stands; asking each of hundreds would take a pass through the model for each.
    roles = denoiser.sites()
    return search([path for path in outputs if roles[path] != "modulate"])


def row_of(denoiser: Denoiser, arguments: Arguments, paths: Sequence[str]) -> Tensor:
    found = returned(denoiser, arguments, paths)
    return torch.cat([found[path][0].float().flatten().cpu() for path in paths])


def returned(denoiser: Denoiser, arguments: Arguments, paths: Sequence[str]) -> dict[str, Tensor]:
    """What these layers return in one call."""
    found: dict[str, Tensor] = {}

    def keep(path: str, out: Tensor) -> None:
        found[path] = out.detach()

    with ExitStack() as hooks, torch.no_grad():
        for path in paths:
            layer = denoiser.model.get_submodule(path)
            hooks.callback(layer.register_forward_hook(lambda _m, _a, out, path=path: keep(path, out)).remove)
        denoiser.predict(arguments)
    return found


def predicted(denoiser: Denoiser, arguments: Arguments, outputs: Mapping[str, Tensor]) -> Tensor:
    """The prediction of a call in which these layers return what is given."""
    with returning(denoiser, outputs), torch.no_grad():
        return denoiser.predict(arguments)


@contextmanager
def returning(denoiser: Denoiser, outputs: Mapping[str, Tensor]) -> Iterator[None]:
    with ExitStack() as hooks:
        for path, out in outputs.items():
            layer = denoiser.model.get_submodule(path)
            hooks.callback(layer.register_forward_hook(lambda _m, _a, _out, given=out: given).remove)
        yield
