"""RMS norms, which classes compute in six passes over their input."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import normalization
from torch import nn


@dataclass(frozen=True)
class RootNorm:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times the weight if there is one."""

    path: str
    keeps: bool  # the dtype of its input, whatever that of its weight


def is_plain_root_norm(module: nn.Module) -> bool:
    """One dimension, no bias, and an eps of its own."""
    shape = {normalization.RMSNorm: "dim", nn.RMSNorm: "normalized_shape"}.get(type(module))
    if shape is None or len(getattr(module, shape)) != 1:
        return False
    return getattr(module, "bias", None) is None and module.eps is not None


def root_norm(path: str, module: nn.Module) -> RootNorm:
    return RootNorm(path, type(module) is nn.RMSNorm)
