"""Content addresses: SHA-256 over tensors and over plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Over names, types, shapes and bytes of all tensors, whatever their order."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        add_tensor(total, name, tensors[name])
    return total.hexdigest()


def add_tensor(total: hashlib._Hash, name: str, value: Tensor) -> None:
    """One more tensor, where they come in the order of their names."""
    value = value.detach().cpu().contiguous()
    total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
    total.update(value.reshape(-1).view(torch.uint8).numpy().data)


def value_digest(value: Any) -> str:
    """Over any value that JSON can hold (everything else through `str`)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
