"""Rotation by regular Hadamard matrices: no column of ones, so that a row with one sign does not become an outlier.

H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], its Kronecker powers over the root of their size, along
groups of the last dimension (arXiv:2512.03673). Symmetric and orthogonal: what rotates also rotates back.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_group(size: int) -> bool:
    """Whether there is such a matrix of this size, beside the one of a single number."""
    return size > 1 and size.bit_count() == 1 and size.bit_length() % 2 == 1


def group_of(width: int, most: int) -> int:
    """The largest group that divides `width` and is no larger than `most`; 0 where there is none."""
    group = 0
    while (group or 1) * 4 <= most and width % ((group or 1) * 4) == 0:
        group = (group or 1) * 4
    return group


def rotate(x: Tensor, group: int) -> Tensor:
    """In float32; the order of additions is that of the compiled kernel, which gives the same bits."""
    y, apart = x.float(), 1
    while apart < group:
        a, b, c, d = y.reshape(-1, 4, apart).unbind(1)
        s, t, u, v = a + b, c + d, a - b, c - d
        y = torch.stack([s + v, s - v, u + t, t - u], 1)
        apart *= 4
    return y.reshape(x.shape) * group**-0.5
