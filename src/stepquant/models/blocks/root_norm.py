"""RMS norms, which classes compute in six passes over their input."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import normalization
from diffusers.models.transformers import transformer_krea2
from torch import Tensor, nn


@dataclass(frozen=True)
class RootNorm:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times the weight if there is one."""

    path: str
    keeps: bool  # the dtype of its input, whatever that of its weight


SHAPES: dict[type[nn.Module], str] = {
    normalization.RMSNorm: "dim",
    normalization.MochiRMSNorm: "dim",
    nn.RMSNorm: "normalized_shape",
}


def is_plain_root_norm(module: nn.Module) -> bool:
    """One dimension, no bias, and an eps of its own."""
    if type(module) is transformer_krea2.Krea2RMSNorm:
        return True
    shape = SHAPES.get(type(module))
    if shape is None or len(getattr(module, shape)) != 1:
        return False
    return getattr(module, "bias", None) is None and module.eps is not None


def root_norm(path: str, module: nn.Module) -> RootNorm:
    return RootNorm(path, type(module) is not normalization.RMSNorm)


def gain(norm: nn.Module) -> Tensor | None:
    """What multiplies the channels behind the norm."""
    weight: Tensor | None = norm.weight  # type: ignore[assignment]
    return weight + 1 if weight is not None and type(norm) is transformer_krea2.Krea2RMSNorm else weight
