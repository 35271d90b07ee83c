"""stepquant: post-training quantization of diffusion models that really runs.

Importing it tells diffusers how to load what stepquant writes; everything else is imported when it is first used.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepquant.version import TORCH
from stepquant.version import __version__ as __version__


def leave(*_: object) -> None:
    """Ctrl-C while a command imports, for seconds, what it needs: nothing has begun."""
    os.write(2, b"\nInterrupted: nothing had begun\n")
    os._exit(130)


# As the program itself, and only there: in a library the interrupt is the caller's.
_ran = sys.argv[:1] == ["-m"] and ("-m", "stepquant") in zip(sys.orig_argv, sys.orig_argv[1:])
_ran = _ran or os.path.basename(sys.argv[0] if sys.argv else "") == "stepquant"
if _ran and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)  # until the command line listens itself

import torch  # noqa: E402

if torch.__version__.partition("+")[0] != TORCH:  # said before anything else can fail of it
    warnings.warn(
        f"stepquant {__version__} is made for torch {TORCH}, and this is {torch.__version__}: C++ kernels that were "
        f"compiled for another torch are left out, which is slower, and nothing is tested with it; "
        f"pip install torch=={TORCH}",
        stacklevel=2,
    )

from stepquant import hub  # noqa: E402, F401 - registers with diffusers
from stepquant.errors import StepquantError  # noqa: E402

if TYPE_CHECKING:
    from stepquant.job import Recipe, load, quantize, quantize_to
    from stepquant.job.card import write_card
    from stepquant.job.export import export
    from stepquant.job.fastest import fastest
    from stepquant.job.foreign import convert

__all__ = [
    "Recipe",
    "StepquantError",
    "convert",
    "export",
    "fastest",
    "load",
    "quantize",
    "quantize_to",
    "write_card",
]


# Where what is not in `job` itself stands: these import what takes a second, or what few need.
_ELSEWHERE = {
    "convert": "job.foreign",
    "export": "job.export",
    "fastest": "job.fastest",
    "write_card": "job.card",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stepquant' has no attribute '{name}'")
    return getattr(import_module(f"stepquant.{_ELSEWHERE.get(name, 'job')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
