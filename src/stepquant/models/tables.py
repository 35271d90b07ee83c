"""What a quantized model knows by step, as far as sampling has to do with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from stepquant.core.steps import StepTable


class StepTables(ABC):
    """Kept by a model as its child `steps`."""

    @abstractmethod
    def times(self) -> StepTable:
        """The times that have an entry."""

    @abstractmethod
    def carry(self, scheduler: Any) -> Any:
        """`scheduler`, in place, with its noise changed as the tables say."""


def tables_of(model: nn.Module) -> StepTables | None:
    return next((child for child in model.children() if isinstance(child, StepTables)), None)
