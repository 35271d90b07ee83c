"""What the ways to original names have in common: rules for names, and rows that are fused or in another order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Rule = tuple[str, str]


def replaced(tensors: Tensors, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Every name through all rules, in their order."""
    made = {}
    for name, value in tensors.items():
        for pattern, by in rules:
            name = re.sub(pattern, by, name)
        made[name] = value
    return made


def joined(tensors: Tensors, where: str, parts: Sequence[str], into: str) -> dict[str, Tensor]:
    """Rows of several layers of a block below each other, as a fused layer has them."""
    made = dict(tensors)
    for name in tensors:
        found = re.fullmatch(f"({where}){re.escape(parts[0])}\\.(weight|bias)", name)
        if found:
            block, leaf = found.group(1), found.group(found.lastindex or 0)
            made[f"{block}{into}.{leaf}"] = torch.cat([made.pop(f"{block}{part}.{leaf}") for part in parts])
    return made


def swapped(tensors: Tensors, paths: Sequence[str]) -> dict[str, Tensor]:
    """The halves of what these layers return in the other order: shift and scale are scale and shift elsewhere."""
    return {
        name: torch.cat(value.chunk(2)[::-1]) if name.rpartition(".")[0] in paths else value
        for name, value in tensors.items()
    }
