"""From the names of a file to those of diffusers, by diffusers' own converters, which also cut and reorder weights.

A converter receives, in place of each packed weight, the numbers of its rows. What comes back says which rows went where, and the
integers and scales of these follow. Whatever else a converter does to a weight is seen: it becomes float, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders import single_file_model
from torch import Tensor, nn

from stepquant.errors import ArtifactError
from stepquant.hub.foreign.container import PREFIXES
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer

MULTIPLYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what has a use for integers
COLUMNS = 2  # of what stands for a weight: enough to see that they stay side by side and in order
CHANGED = (
    "the converter of diffusers does more to it than to move its rows, which packed integers do not bear"
)


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
    homeless: frozenset[str] = frozenset()  # layers of the file whose integers have no place in the network


def translate(found: ForeignFile, model: nn.Module) -> Translated:
    """Give every tensor of the file its place in `model`; none is left over, and none is missing.

    Layers whose integers have no place there become float where their format allows it.
    """
    homeless: frozenset[str] = frozenset()
    while True:
        packed = [one for one in found.layers.values() if one.integer and one.path not in homeless]
        made = attempt(found, packed, model)
        if not made.homeless:
            return Translated(made.layers, made.floats, homeless)
        homeless |= made.homeless


def attempt(found: ForeignFile, packed: Sequence[ForeignLayer], model: nn.Module) -> Translated:
    """With the integers of these layers, and all others in float."""
    kept, shapes = {layer.path for layer in packed}, model.state_dict()
    given = {name: found.file.read(name) for name in found.floats} | numbered(packed)
    given |= {one.weight: one.floats(found.file) for p, one in found.layers.items() if p not in kept}
    layers, floats, homeless, claimed, changed = {}, {}, set[str](), set[str](), False
    for name, value in renamed(given, model, found).items():
        path, wanted = name.removesuffix(".weight"), tuple(shapes[name].shape)
        if value.dtype != torch.int64:
            check_shape(name, tuple(value.shape), wanted, found)
            floats[name] = value
            continue
        moved = name.endswith(".weight") and value.dim() == len(wanted)
        place = placed(value, packed) if moved else None
        sources = tuple(packed) if place is None else place.sources
        why = CHANGED if place is None else why_homeless(place, model.get_submodule(path), wanted)
        if why and not all(source.may_be_float for source in sources):
            raise misplaced(name, why, value, found)
        if place is None:
            changed = True
            continue
        claimed |= {source.path for source in sources}
        if why:
            homeless |= {source.path for source in sources}
        else:
            check_shape(name, (len(place.rows), *sources[0].shape[1:]), wanted, found)
            layers[path] = place
    if changed:  # by elimination: whatever no other weight was made of
        homeless |= kept - claimed or kept
    return Translated(layers, floats, frozenset(homeless))


def numbered(packed: Sequence[ForeignLayer]) -> dict[str, Tensor]:
    """What stands for the weights on their way through a converter: the numbers of their rows, over all of them."""
    made, begin = {}, 0
    for layer in packed:
        rows = torch.arange(begin, begin + layer.shape[0])
        marks = COLUMNS * rows[:, None] + torch.arange(COLUMNS)
        made[layer.weight] = marks.reshape(*marks.shape, *[1] * (len(layer.shape) - 2))
        begin += layer.shape[0]
    return made


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
    known = 2 * len(expected & set(most)) > len(
        expected
    )  # then a converter for other names says nothing of these
    raise nameless(found, model, expected, set(most), "" if known else "; ".join(dict.fromkeys(reasons)))


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


def placed(value: Tensor, packed: Sequence[ForeignLayer]) -> Placed | None:
    """From which rows of which layers a weight was put together; None where more was done than to move rows."""
    ends = torch.tensor([layer.shape[0] for layer in packed]).cumsum(0)
    value = value.flatten(1) if value.dim() > 1 else value[:, None]
    rows = value[:, 0] // COLUMNS
    kept = torch.equal(value, COLUMNS * rows[:, None] + torch.arange(COLUMNS))
    if not kept or not bool((rows >= 0).all() and (rows < ends[-1]).all()):
        return None
    owners = torch.searchsorted(ends, rows, right=True)
    chosen, which = owners.unique(return_inverse=True)
    sources = tuple(packed[index] for index in chosen.tolist())
    outputs = torch.tensor([layer.shape[0] for layer in sources])
    before = outputs.cumsum(0) - outputs  # rows of the sources that lie above
    return Placed(sources, rows - (ends[chosen] - outputs)[which] + before[which])


def why_homeless(place: Placed, layer: nn.Module, wanted: tuple[int, ...]) -> str:
    """Why integers of a layer of the file cannot be those of a layer of the network; nothing: they can."""
    shape = place.sources[0].shape
    if len({source.kind for source in place.sources}) > 1:
        return "it is put together from layers that were packed or rotated differently"
    if not isinstance(layer, MULTIPLYING):
        return f"it is packed, and of a {type(layer).__name__}, which multiplies nothing"
    if len(shape) != len(wanted) and math.prod(shape[1:]) == math.prod(wanted[1:]):
        return f"{shape} becomes {wanted}"
    return ""


def misplaced(name: str, why: str, value: Tensor, found: ForeignFile) -> ArtifactError:
    return ArtifactError(
        f"tensor '{name}' does not fit the network: {why}",
        where=str(found.file.path),
        got=tuple(value.shape),
        expected="integers of a linear, in rows of its inputs",
        fix="give the config.json of the network that the file is of; or convert the float file, and quantize that",
    )


def check_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...], found: ForeignFile) -> None:
    if got != wanted:
        raise ArtifactError(
            f"tensor '{name}' does not fit the network",
            where=str(found.file.path),
            got=got,
            expected=wanted,
            fix="give the config.json of the network that the file is of",
        )
