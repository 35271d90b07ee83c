"""A pipeline that is quantized, saved and loaded: to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline

import stepquant
from stepquant.quant.plan import Plan


def reloaded(pipeline: Any, plan: Plan, folder: Path) -> Any:
    """Quantized in place by minmax; what was loaded predicts the same."""
    stepquant.quantize(pipeline, method="minmax", plan=plan, samples=4, steps=4)
    pipeline.save_pretrained(folder)
    loaded = DDIMPipeline.from_pretrained(folder)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(500)
    with torch.no_grad():
        want, got = (one.unet(x, t).sample for one in (pipeline, loaded))
    assert torch.equal(want, got)
    return loaded
