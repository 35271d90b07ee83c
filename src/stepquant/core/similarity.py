"""Structural similarity of pairs of images."""

from __future__ import annotations

import torch
from torch import Tensor

SSIM_WINDOW = 11


def ssim(a: Tensor, b: Tensor) -> Tensor | None:
    """Structural similarity, borders mirrored; None where images are smaller than its window."""
    if min(a.shape[-2:]) < SSIM_WINDOW:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure  # which takes a second

    found = structural_similarity_index_measure(a.float(), b.float(), data_range=1.0, reduction="none")
    return torch.as_tensor(found).double().reshape(-1)
