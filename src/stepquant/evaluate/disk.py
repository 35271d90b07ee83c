"""Size on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepquant.errors import EvaluationError
from stepquant.evaluate.several import sizes
from stepquant.models.denoiser import Denoiser, by_denoiser


def size(float_pipeline: Any, folder: Path) -> dict[str, Any]:
    """Bytes of the quantized denoisers' weight files, against four bytes for each number of the float ones."""
    return sizes([size_beside(Denoiser.of(one), folder) for one in by_denoiser(float_pipeline)])


def size_beside(denoiser: Denoiser, folder: Path) -> dict[str, Any]:
    """The same for one given float denoiser; only the shapes of its weights count."""
    inside = Path(folder) / denoiser.component
    files = sorted((inside if inside.is_dir() else Path(folder)).glob("*.safetensors"))
    if not files:
        raise EvaluationError(
            "no weight files to measure", where=str(folder), expected="a saved pipeline or model"
        )
    float_bytes = sum(4 * value.numel() for value in denoiser.model.state_dict().values())
    stored = sum(file.stat().st_size for file in files)
    return {"float_bytes": float_bytes, "bytes": stored, "ratio": stored / float_bytes}
