"""From the names of a file to those of diffusers, by diffusers' own converters, which also cut and reorder weights.

A converter receives, in place of each packed weight, the numbers of its rows. What comes back says which rows went where, and the
integers and scales of these follow. Whatever else a converter does to a weight is seen, and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders import single_file_model
from torch import Tensor, nn

from stepquant.errors import ArtifactError
from stepquant.hub.foreign.comfy import ForeignFile, ForeignLayer
from stepquant.hub.foreign.container import PREFIXES

COLUMNS = 2  # of what stands for a weight: enough to see that they stay side by side and in order


@dataclass(frozen=True)
class Placed:
    """Where the weight of one layer of the network comes from."""

    sources: tuple[ForeignLayer, ...]
    rows: Tensor  # of the sources' rows, one below the other


@dataclass(frozen=True)
class Translated:
    """The network's tensors by their names in diffusers."""

    layers: Mapping[str, Placed]  # by the path of the layer
    floats: Mapping[str, Tensor]


def translate(found: ForeignFile, model: Any) -> Translated:
    """Give every tensor of the file its place in `model`; none is left over, and none is missing."""
    packed = [layer for layer in found.layers.values() if layer.integer]
    ends = torch.tensor([layer.outputs for layer in packed], dtype=torch.int64).cumsum(0)
    given = {name: found.file.read(name) for name in found.floats}
    given |= {f"{p}.weight": one.floats(found.file) for p, one in found.layers.items() if not one.integer}
    for layer, end in zip(packed, ends.tolist()):
        rows = torch.arange(end - layer.outputs, end)
        given[f"{layer.path}.weight"] = COLUMNS * rows[:, None] + torch.arange(COLUMNS)
    named = renamed(given, model, found)
    layers, floats = {}, {}
    for name, value in named.items():
        if value.dtype == torch.int64:
            layers[name.removesuffix(".weight")] = placed(name, value, ends, packed, found)
        else:
            floats[name] = value
    check_places(layers, floats, model, found)
    return Translated(layers, floats)


def renamed(given: Mapping[str, Tensor], model: Any, found: ForeignFile) -> dict[str, Tensor]:
    """As they are where the names are diffusers' own; else what the converter for the class makes of them."""
    expected = set(model.state_dict())
    if expected == set(given):
        return dict(given)
    convert = converter_of(type(model))
    if convert is None:
        raise nameless(found, model, expected, set(given), "diffusers has no converter for this class")
    reasons, most = [], dict(given)
    # Some converters look for the prefix, others take it away, and few know nothing of it.
    for prefix in (PREFIXES[0], ""):
        try:
            made = convert(checkpoint={prefix + n: v for n, v in given.items()}, config=dict(model.config))
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
            reasons.append(f"{type(error).__name__} {str(error).splitlines()[0][:120]}")
            continue
        if expected == set(made):
            return made
        if len(expected & set(made)) >= len(expected & set(most)):
            most = made
    raise nameless(found, model, expected, set(most), "; ".join(reasons))


def converter_of(kind: type[nn.Module]) -> Callable[..., dict[str, Tensor]] | None:
    name = single_file_model._get_single_file_loadable_mapping_class(kind)
    known: Mapping[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    return known[name].get("checkpoint_mapping_fn") if name else None


def nameless(
    found: ForeignFile, model: nn.Module, expected: set[str], got: set[str], why: str
) -> ArtifactError:
    missing, extra = sorted(expected - got), sorted(got - expected)
    name = (missing or extra)[0]
    return ArtifactError(
        f"tensor '{name}' is {'missing from' if missing else 'foreign to'} {type(model).__name__} in this file",
        where=str(found.file.path),
        got=f"{len(missing)} missing, {len(extra)} extra{f'; {why}' if why else ''}",
        expected="tensors in the names of diffusers, or in original names that diffusers can convert",
        fix="give the config.json of the network that the file is of",
    )


def placed(
    name: str, value: Tensor, ends: Tensor, packed: Sequence[ForeignLayer], found: ForeignFile
) -> Placed:
    """From which rows of which layers a weight of the network was put together."""
    rows = value[:, 0] // COLUMNS if value.dim() == 2 else value
    kept = value.dim() == 2 and torch.equal(value, COLUMNS * rows[:, None] + torch.arange(COLUMNS))
    kept = kept and bool((rows >= 0).all() and (rows < ends[-1]).all())
    if not kept or not name.endswith(".weight"):
        raise ArtifactError(
            f"the converter of diffusers does more to '{name}' than to move its rows, which packed integers do not bear",
            where=str(found.file.path),
            got=tuple(value.shape),
            fix="convert the float file, and quantize that",
        )
    owners = torch.searchsorted(ends, rows, right=True)
    chosen, which = owners.unique(return_inverse=True)
    sources = tuple(packed[index] for index in chosen.tolist())
    outputs = torch.tensor([layer.outputs for layer in sources])
    before = outputs.cumsum(0) - outputs  # rows of the sources that lie above
    return Placed(sources, rows - (ends[chosen] - outputs)[which] + before[which])


def check_places(
    layers: Mapping[str, Placed], floats: Mapping[str, Tensor], model: nn.Module, found: ForeignFile
) -> None:
    """Every weight has the shape of its layer, and integers are for linears alone."""
    for name, wanted in model.state_dict().items():
        path = name.removesuffix(".weight")
        place = layers.get(path) if name.endswith(".weight") else None
        got = tuple(floats[name].shape) if place is None else (len(place.rows), place.sources[0].inputs)
        packed = place is not None and not isinstance(model.get_submodule(path), nn.Linear)
        alike = place is None or len({(one.inputs, one.marker.rotation) for one in place.sources}) == 1
        if got != tuple(wanted.shape) or packed or not alike:
            raise ArtifactError(
                f"tensor '{name}' does not fit the network"
                if alike
                else f"'{name}' is put together from layers that were rotated differently",
                where=str(found.file.path),
                got=f"{got}, packed for {type(model.get_submodule(path)).__name__}" if packed else got,
                expected=f"a linear of {tuple(wanted.shape)}" if packed else tuple(wanted.shape),
                fix="give the config.json of the network that the file is of",
            )
