"""Whether quantized time embeddings still tell steps apart: their nearest float embeddings by cosine.

An embedding that is nearest to that of another step makes the network denoise as if it were there: arXiv:2311.16503.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.blocks.structure import time_path

# Steps of the table of cosines that a page shows.
MOST_SHOWN = 20


@contextmanager
def watch_embedding(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output of the model's time embedding for the first sample of each call; empty where it has none."""
    found: list[Tensor] = []
    path = time_path(model)

    def hook(_: nn.Module, __: Any, out: Tensor) -> None:
        found.append(out.detach().float().reshape(-1, out.shape[-1])[0].cpu().clone())

    handle = None if path is None else model.get_submodule(path[1]).register_forward_hook(hook)
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()


def confusion(ours: Sequence[Tensor], theirs: Sequence[Tensor], t: Sequence[float]) -> dict[str, Any] | None:
    """For each step, the step of the float model whose embedding is nearest by cosine, and the share of wrong ones.

    ours, theirs: embeddings of the quantized and of the float model at the times `t`. Steps of the same time cannot be
    told apart and are no confusion. A model that reads a table instead of embedding t has nothing to confuse.
    """
    if not ours or len(ours) != len(theirs) or len(t) != len(ours) or ours[0].shape != theirs[0].shape:
        return None
    directions = [nn.functional.normalize(torch.stack(list(rows)).double(), dim=1) for rows in (ours, theirs)]
    # argmax over t' of cos(quantized embedding of t, float embedding of t'), arXiv:2311.16503.
    cosine = directions[0] @ directions[1].T
    nearest = cosine.argmax(1).tolist()
    wrong = [t[found] != t[step] for step, found in enumerate(nearest)]
    shown = spread(len(t))
    return {
        "t": list(t),
        "nearest": nearest,
        "rate": sum(wrong) / len(wrong),
        "worst": float(cosine.diagonal().min()),
        "shown": shown,
        "cosine": [[float(cosine[row, column]) for column in shown] for row in shown],
    }


def spread(count: int) -> list[int]:
    """At most `MOST_SHOWN` of `count` steps, evenly spaced, the first and the last among them."""
    wanted = min(count, MOST_SHOWN)
    return sorted({round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)})
