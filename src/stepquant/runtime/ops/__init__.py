"""The operations between integer layers: compiled kernels where the extension was built, plain torch elsewhere.

All take bfloat16 or float32 of any strides and write unsigned bytes (or the input's dtype) with the channels densest;
each is one function in this folder that states what it computes. Small tensors (weights, biases, modulations) may have
either dtype.
"""

from __future__ import annotations

import importlib

import torch

from stepquant.runtime.ops.code import Code
from stepquant.runtime.ops.elementwise import (
    activate,
    activation_quantize,
    quantize,
    quantize_concat,
    upsample_nearest2x,
)
from stepquant.runtime.ops.fused_attention import attention
from stepquant.runtime.ops.norms import (
    group_norm,
    group_norm_quantize,
    layer_norm_quantize,
    rms_norm_quantize,
)
from stepquant.runtime.ops.operation import Operation
from stepquant.runtime.ops.products import Product, convolve, linear, pack_weight

__all__ = [
    "Code",
    "Operation",
    "Product",
    "activate",
    "activation_quantize",
    "attention",
    "compiled",
    "convolve",
    "group_norm",
    "group_norm_quantize",
    "layer_norm_quantize",
    "linear",
    "pack_weight",
    "quantize",
    "quantize_concat",
    "rms_norm_quantize",
    "upsample_nearest2x",
    "why_plain",
]


def _load() -> str | None:
    """Why there are no kernels; None where there are."""
    try:
        importlib.import_module("stepquant._C")
    except ModuleNotFoundError:
        return "the C++ kernels are not built (no compiler at install?)"
    except ImportError as error:
        return (
            f"the C++ kernels were built for another torch than {torch.__version__} "
            f"({' '.join(str(error).split())[:200]}): in stepquant's source, rebuild them with "
            "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."
        )
    return None


_WHY_PLAIN = _load()
_COMPILED = _WHY_PLAIN is None
# Asked once, because torch.compile follows what returns a tensor and no text.
_CAPABILITY: str = torch.ops.stepquant.capability() if _COMPILED else "none"


def compiled() -> bool:
    """Whether the C++ kernels are there; without them every operation runs as several torch calls."""
    return _COMPILED


def why_plain() -> str | None:
    """What is the matter with the C++ kernels, and what to do about it; None where they are there."""
    return _WHY_PLAIN


def capability() -> str:
    """The instruction set the kernels were dispatched to: amx, avx512vnni, avx512, avx2, plain, or none if not compiled."""
    return _CAPABILITY
