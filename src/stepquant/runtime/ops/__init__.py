"""The operations between integer layers: compiled kernels where the extension was built, plain torch elsewhere.

All take bfloat16 or float32 of any strides and write unsigned bytes (or the input's dtype) with the channels densest;
each is one function in this folder that states what it computes. Small tensors (weights, biases, modulations) may have
either dtype.
"""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import torch

from stepquant.runtime.ops.code import Code
from stepquant.runtime.ops.elementwise import (
    activate,
    activation_quantize,
    move_codes,
    quantize,
    quantize_concat,
    quantize_rows,
    rotate_quantize_rows,
    row_scales,
    scale_rows,
    upsample_nearest2x,
)
from stepquant.runtime.ops.fused_attention import MOST_KEYS, attention, attention_by_row
from stepquant.runtime.ops.norms import (
    group_norm,
    group_norm_quantize,
    layer_norm_quantize,
    layer_norm_rotary_quantize,
    rms_norm,
    rms_norm_quantize,
    rms_norm_rotary_quantize,
)
from stepquant.runtime.ops.operation import Operation
from stepquant.runtime.ops.products import (
    Product,
    convolve,
    linear,
    multiply_side,
    pack_side,
    pack_weight,
    stored_linear,
)

__all__ = [
    "MOST_KEYS",
    "Code",
    "Operation",
    "Product",
    "activate",
    "activation_quantize",
    "attention",
    "attention_by_row",
    "compiled",
    "convolve",
    "group_norm",
    "group_norm_quantize",
    "layer_norm_quantize",
    "layer_norm_rotary_quantize",
    "linear",
    "move_codes",
    "multiply_side",
    "pack_side",
    "pack_weight",
    "quantize",
    "quantize_concat",
    "quantize_rows",
    "rms_norm",
    "rms_norm_quantize",
    "rms_norm_rotary_quantize",
    "rotate_quantize_rows",
    "row_scales",
    "scale_rows",
    "stored_linear",
    "upsample_nearest2x",
    "why_plain",
]


def _load() -> str | None:
    """Why there are no kernels; None where there are."""
    found = find_spec("stepquant._C")
    if found is None or found.origin is None:
        return "the C++ kernels are not built (no compiler at install?)"
    built_for, here = torch_of(Path(found.origin)), str(torch.__version__).partition("+")[0]
    if built_for not in (None, here):  # the loader may find every symbol, and what lies behind them has moved
        return _other_torch(f"they want torch {built_for}")
    try:
        importlib.import_module("stepquant._C")
    except ImportError as error:
        return _other_torch(" ".join(str(error).split())[:200])
    return None


def torch_of(kernels: Path) -> str | None:
    """The torch that a compiled module was built for, as the file itself says, which is not loaded for it."""
    found = re.search(rb"stepquant, built for torch ([0-9a-z.]+)", kernels.read_bytes())
    return found[1].decode() if found else None


def _other_torch(reason: str) -> str:
    return (
        f"the C++ kernels were built for another torch than {torch.__version__} ({reason}): "
        "in stepquant's source, rebuild them with "
        "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."
    )


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
