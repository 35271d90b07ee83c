"""What a file of another program holds of a network, whatever the program: layers of integers, and floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepquant.core.policy import StepPolicy
from stepquant.hub.foreign.container import Container
from stepquant.hub.foreign.rows import Rows


@dataclass(frozen=True)
class ForeignLayer(ABC):
    """One quantized layer of a file, by its path there. Nothing is read before it is asked for."""

    path: str
    shape: tuple[int, ...]  # of the weight

    @property
    def weight(self) -> str:
        """The name of its tensor."""
        return f"{self.path}.weight"

    @property
    @abstractmethod
    def format(self) -> str:
        """In the words of the program that wrote it."""

    @property
    @abstractmethod
    def shared(self) -> str:
        """Over what a scale is shared: tensor, row, or a number of inputs."""

    @property
    @abstractmethod
    def why_float(self) -> str:
        """What stands in the way of keeping its integers; nothing: they are kept."""

    @abstractmethod
    def rows(self, file: Container) -> Rows:
        """Its integers as they are in the file."""

    @abstractmethod
    def floats(self, file: Container) -> Tensor:
        """The numbers that it stands for, in the shape of the weight."""

    def branch(self, file: Container) -> tuple[Tensor, Tensor] | None:
        """Beside the integers: (rank, inputs) and (outputs, rank), whose product is added to the weight; mostly none."""
        return None

    @property
    def integer(self) -> bool:
        return not self.why_float

    @property
    def why_no_product(self) -> str:
        """What stands in the way of multiplying its integers."""
        return self.why_float or ("" if self.dynamic else "weight-only: the file does not quantize inputs")

    @property
    def rotation(self) -> int:
        """The group in which its inputs are to be rotated; 0: they are not."""
        return 0

    @property
    def dynamic(self) -> bool:
        """Whether the format has its inputs quantized as they come."""
        return False

    @property
    def may_be_float(self) -> bool:
        """Whether it becomes float where the network has no use for its integers; elsewhere that is an error."""
        return True

    @property
    def kind(self) -> tuple[object, ...]:
        """In what layers agree whose rows can lie below each other in one."""
        return self.format, self.shape[1:], self.rotation


@dataclass(frozen=True)
class ForeignFile:
    """All that a file holds of a network."""

    file: Container
    layers: Mapping[str, ForeignLayer]
    floats: tuple[str, ...]  # tensors as they are
    dialect: str = ""  # how the program says what its tensors are, and of which network
    program: str = "ComfyUI"  # that reads such files
    settings: Mapping[str, Any] | None = None  # of the network, where they are beside its weights
    policy: tuple[StepPolicy, str] | None = (
        None  # of steps whose activations stay in float, and for which part
    )
