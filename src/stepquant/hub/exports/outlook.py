"""What a format can carry of a network, known before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import RuntimeSupportError
from stepquant.hub.exports.at_rest import Network
from stepquant.runtime.layers.packed import PackedWeight

# Between these scales, floats of sixteen bits keep integers of eight bits apart: near zero they lie 2^-24 from each other.
LEAST_SCALE, MOST_SCALE = 2.0**-20, 1.0


TABLE = "tables of embeddings are written as floats"


@dataclass(frozen=True)
class Fate:
    """What becomes of one quantized layer."""

    path: str
    becomes: str  # in the words of the format
    reason: str = ""  # why its integers are not in the file; none if they are

    @property
    def kept(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Outlook:
    """What becomes of a network in a file: layer by layer, and what is left behind."""

    fates: tuple[Fate, ...]
    left: tuple[str, ...]  # what else is not in the file, in a sentence each
    notes: tuple[str, ...] = ()  # what whoever reads the file should know

    @property
    def kept(self) -> int:
        return sum(fate.kept for fate in self.fates)

    def to_json(self) -> dict[str, Any]:
        layers = {one.path: {"becomes": one.becomes, "reason": one.reason} for one in self.fates}
        return {"kept": self.kept, "layers": layers, "left": list(self.left), "notes": list(self.notes)}


def check_float_form(network: Network, to: str) -> None:
    """A network whose time layers are tables lacks weights that the formats of files of weights ask for."""
    steps = network.config.artifact.steps
    if steps is not None and steps.table:
        raise RuntimeSupportError(
            f"export to {to}: a table holds what the time embedding becomes, and the layers that made it are gone",
            where=str(network.folder),
            fix="quantize it by a method that keeps them (stepquant methods), as minmax",
        )


def left_of_activations(network: Network, instead: str) -> tuple[str, ...]:
    """What weights alone do not say: ranges of inputs, products of attention, corrections of steps."""
    own = network.config.artifact
    ranges = [one for one in own.layers.values() if one.input and one.input.granularity != "token"]
    left = []
    if ranges:
        by_step = " by step" if any(one.input and one.input.granularity == "step" for one in ranges) else ""
        left.append(f"the ranges{by_step} of the inputs of {len(ranges)} layers: {instead}")
    if own.products:
        left.append(
            f"the integers of {len(own.products)} products of attention, which are multiplied in float"
        )
    if own.steps is not None and own.steps.channels:
        left.append("the correction of the predictions at every step")
    return (*left, *left_of_steps(network))


def left_of_steps(network: Network) -> tuple[str, ...]:
    """What no other format tells of steps in float."""
    policy = network.config.artifact.policy
    return () if policy is None else (f"the policy {policy.policy}: all steps are alike",)


def dtype_of(network: Network, name: str) -> torch.dtype:
    """Of a tensor of the float network: sixteen bits where integers stand for it, if that keeps these apart."""
    path = name.rpartition(".")[0]
    if not is_packed(network, path):
        return network.tensors[name].dtype
    if name.endswith(".bias"):
        return torch.float32
    found = [half_or_float(part) for part in parts_of(network, path)]
    return torch.float32 if torch.float32 in found else torch.float16


def half_or_float(layer: Any) -> torch.dtype:
    if not isinstance(layer, PackedWeight) or layer.spec.balanced or layer.spec.offset:
        return torch.float32
    low, high = layer.weight_scale.aminmax()
    return torch.float16 if low >= LEAST_SCALE and high <= MOST_SCALE else torch.float32


def float_value(network: Network, name: str) -> Tensor:
    """A tensor of the float network; where integers stand for it, what they stand for."""
    path, _, leaf = name.rpartition(".")
    if not is_packed(network, path):
        return network.tensors[name]
    parts = parts_of(network, path)
    if leaf == "bias":
        return parts[0].bias  # type: ignore[no-any-return]
    made = [
        part.total_weight(torch.float32) if isinstance(part, PackedWeight) else part.weight.detach()
        for part in parts
    ]
    return torch.cat(made, 1).to(dtype_of(network, name))


def parts_of(network: Network, path: str) -> list[Any]:
    """The layers of which one of the float network is the sum."""
    if path in network.split:
        return list(network.split[path].children())
    return [network.tables[path] if path in network.tables else network.layers[path]]


def is_packed(network: Network, path: str) -> bool:
    """Whether integers stand for the weight there."""
    return path in network.split or path in network.layers or path in network.tables


def fates_of_tables(network: Network) -> tuple[Fate, ...]:
    """Files of weights have tables of embeddings in float: programs that read them look rows up themselves."""
    return tuple(
        Fate(path, str(dtype_of(network, f"{path}.weight")).removeprefix("torch."), TABLE)
        for path in network.tables
    )
