"""Operations of ONNX by name, in a graph that is being traced by torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPSET = 21  # the first in which a zero point may stand for a block


def node(
    name: str, inputs: Sequence[Tensor], dtype: torch.dtype, shape: Any, domain: str = "", **attributes: Any
) -> Tensor:
    symbolic: Callable[..., Tensor] = torch.onnx.ops.symbolic
    called, version = (f"{domain}::{name}", 1) if domain else (name, OPSET)
    return symbolic(called, inputs, attributes, dtype=dtype, shape=shape, version=version)
