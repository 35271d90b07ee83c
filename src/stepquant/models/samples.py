"""Which of the arguments of a call belong to some of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepquant.models.families.family import Family


def samples_at(arguments: Mapping[str, Any], places: Tensor, family: Family) -> dict[str, Any]:
    """The call of the samples at these places: what is declared as shared stays, and of all else their rows."""
    x = arguments[family.x]
    rows = Rows(places, len(x), isinstance(x, list))
    return {name: value if name in family.shared else rows.of(value) for name, value in arguments.items()}


@dataclass(frozen=True)
class Rows:
    """The samples at these places, of so many, which some models take as elements of lists."""

    places: Tensor
    entries: int
    listed: bool

    def of(self, value: Any) -> Any:
        """Theirs in an argument, or in what is nested in it; where frames are folded into rows, each sample has several."""
        if isinstance(value, Mapping):
            return {name: self.of(inner) for name, inner in value.items()}
        if isinstance(value, list) and self.listed and len(value) == self.entries:
            return [value[place] for place in self.places.tolist()]
        if isinstance(value, list | tuple):
            return type(value)(self.of(inner) for inner in value)
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        places = self.places.to(value.device)
        if len(value) == self.entries:
            return value[places]
        if value.ndim > 2 and len(value) % self.entries == 0:
            return value.unflatten(0, (self.entries, -1))[places].flatten(0, 1)
        return value
