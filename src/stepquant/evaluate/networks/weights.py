"""Weights of measuring networks, from a file of the user's or of the hub: safetensors only, every name and shape checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.models import zoo

# How a zip archive and a pickle begin: what torch.save writes.
PICKLED = (b"PK\x03\x04", b"\x80")
HUB = "hub:"
# What a folder of the hub is fetched for: never a pickle.
SAFE = ["*.safetensors", "*.json", "*.txt"]


def local(where: str) -> Path:
    """A path as it is; the folder of an embedded model; hub:OWNER/NAME/FILE, or hub:OWNER/NAME for all that is safe there, fetched once."""
    if where in zoo.names():
        return zoo.path(where)
    if not where.startswith(HUB):
        return Path(where)
    owner, _, rest = where.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise EvaluationError(
            "this names nothing on the hub",
            got=where,
            expected="hub:OWNER/NAME/FILE, or hub:OWNER/NAME for a folder",
        )
    try:
        found = (
            hf_hub_download(f"{owner}/{name}", file)
            if file
            else snapshot_download(f"{owner}/{name}", allow_patterns=SAFE)
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise EvaluationError(
            "the hub did not give these weights",
            where=where,
            got=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            fix="check the name and the network, or fetch the file by hand and give its path",
        ) from error
    return Path(found)


def read_weights(
    file: Path,
    expected: Mapping[str, Tensor],
    *,
    what: str,
    hint: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Tensor]:
    """The tensors of `file` as float32, which must be those of `expected` by name and shape.

    hint: one line that converts the file in which these weights are usually found.
    """
    found = {name: value for name, value in load(file, what, hint).items() if not ignored(name)}
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        raise EvaluationError(
            f"this file does not hold the weights of {what}",
            where=str(file),
            got=f"'{missing[0]}' is missing" if missing else f"'{extra[0]}' besides",
            expected=f"{len(expected)} tensors, of which {len(expected) - len(missing)} are there",
            fix=hint,
        )
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise EvaluationError(
                f"'{name}' is not that of {what}",
                where=str(file),
                got=tuple(value.shape),
                expected=tuple(expected[name].shape),
                fix=hint,
            )
        if not torch.isfinite(value.float()).all():
            raise EvaluationError(
                f"'{name}' holds NaN or infinite values", where=str(file), fix="fetch the file again"
            )
    return {name: value.float() for name, value in found.items()}


def load(file: Path, what: str, hint: str) -> dict[str, Tensor]:
    try:
        with Path(file).open("rb") as stream:
            start = stream.read(4)
        if start.startswith(PICKLED):
            raise EvaluationError(
                f"the weights of {what} come as a pickle, which is never loaded: it can run any code",
                where=str(file),
                expected="a .safetensors file",
                fix=f"convert it once, if you trust it: {hint}",
            )
        return load_file(file)
    except (OSError, SafetensorError) as error:
        words = getattr(error, "strerror", None) or error
        raise EvaluationError(
            f"cannot read the weights of {what}: {words}",
            where=str(file),
            expected="a .safetensors file",
            fix=hint,
        ) from error
