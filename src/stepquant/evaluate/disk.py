"""Size on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepquant.errors import EvaluationError
from stepquant.models.denoiser import Denoiser


def size(float_pipeline: Any, folder: Path) -> dict[str, Any]:
    """Bytes of the quantized denoiser's weight files, against four bytes for each number of the float one."""
    return size_beside(Denoiser.of(float_pipeline), folder)


def size_beside(denoiser: Denoiser, folder: Path) -> dict[str, Any]:
    """The same for a given float denoiser; only the shapes of its weights count."""
    inside = Path(folder) / denoiser.component
    files = sorted((inside if inside.is_dir() else Path(folder)).glob("*.safetensors"))
    if not files:
        raise EvaluationError(
            "no weight files to measure", where=str(folder), expected="a saved pipeline or model"
        )
    float_bytes = sum(4 * value.numel() for value in denoiser.model.state_dict().values())
    stored = sum(file.stat().st_size for file in files)
    return {"float_bytes": float_bytes, "bytes": stored, "ratio": stored / float_bytes}
