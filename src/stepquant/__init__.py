"""stepquant: post-training quantization of diffusion models that really runs.

Importing it tells diffusers how to load what stepquant writes; everything else is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stepquant import hub  # noqa: F401 - registers with diffusers
from stepquant.errors import StepquantError

if TYPE_CHECKING:
    from stepquant.job import Recipe, load, quantize, quantize_to
    from stepquant.job.fastest import fastest

__all__ = ["Recipe", "StepquantError", "fastest", "load", "quantize", "quantize_to"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stepquant' has no attribute '{name}'")
    if name == "fastest":  # imports what measures, which takes a second
        from stepquant.job.fastest import fastest

        return fastest
    from stepquant import job

    return getattr(job, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
