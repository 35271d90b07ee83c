"""The arguments of a call, taken apart into tensors with a row for each sample and what all samples share, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import CalibrationError
from stepquant.models.families.family import Family

PLAIN = (bool, int, float, str, type(None))


@dataclass
class Parts:
    """Tensors of one call by dotted names; `form` puts them back where they were, and is JSON."""

    entries: int  # samples in the call
    declared: bool = True  # what belongs to no sample is known; otherwise it is seen
    form: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # one a sample, whatever they were kept in
    shared: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Mapping[str, Any], family: Family) -> Parts:
        parts = cls(len(arguments[family.x]), not family.generic)
        parts.form = {n: parts.take(value, n, n in family.shared) for n, value in arguments.items()}
        return parts

    def take(self, value: Any, name: str, shared: bool) -> Any:
        """The form of a value whose tensors are kept under its name."""
        if isinstance(value, Tensor):
            return self.take_tensor(value, name, shared)
        if isinstance(value, Mapping):
            inner = {str(key): self.take(one, f"{name}.{key}", shared) for key, one in value.items()}
            return {"table": inner}
        if isinstance(value, list) and not shared and self.one_a_sample(value):
            self.rows[name] = torch.stack(value)
            return {"each": name}
        if isinstance(value, list | tuple):
            kept = [self.take(one, f"{name}.{place}", shared) for place, one in enumerate(value)]
            return {"tuple": kept} if isinstance(value, tuple) else kept
        if isinstance(value, PLAIN):
            return value
        raise CalibrationError(
            f"the argument '{name}' of the denoiser cannot be recorded", got=type(value).__name__
        )

    def take_tensor(self, value: Tensor, name: str, shared: bool) -> dict[str, Any]:
        """A row for each sample, some for each, or one for all; what else there is belongs to no sample."""
        length, entries = len(value) if value.ndim else 1, self.entries
        if not shared and (length in (1, entries)):
            self.rows[name] = value.expand(entries, *value.shape[1:])
            return {"rows": name}
        if not shared and value.ndim > 2 and length % entries == 0:
            self.rows[name] = value.unflatten(0, (entries, -1))
            return {"several": name}
        if not shared and self.declared:
            raise CalibrationError(
                f"the argument '{name}' of the denoiser has other rows than its noisy input",
                got=tuple(value.shape),
                expected=f"{entries} rows, or one",
                fix="declare it as shared in its family, if it has no batch axis",
            )
        self.shared[name] = value.detach().cpu().clone()  # two arguments may be one tensor
        return {"shared": name}

    def one_a_sample(self, value: list[Any]) -> bool:
        tensors = all(isinstance(one, Tensor) for one in value)
        return tensors and len(value) == self.entries and len({one.shape for one in value}) == 1


def put_together(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of a form; `tensors` are rows of any samples, and what they share."""
    if isinstance(form, list):
        return [put_together(one, tensors) for one in form]
    if not isinstance(form, dict):
        return form
    ((kind, inner),) = form.items()
    if kind == "table":
        return {key: put_together(one, tensors) for key, one in inner.items()}
    if kind == "tuple":
        return tuple(put_together(one, tensors) for one in inner)
    value = tensors[inner]
    return value.flatten(0, 1) if kind == "several" else list(value) if kind == "each" else value
