"""The embedded models: small, trained in this repository, ordinary diffusers folders."""

from __future__ import annotations

from pathlib import Path

from stepquant.errors import UnknownNameError

PREFIX = "stepquant:"
HERE = Path(__file__).parent


def names() -> list[str]:
    """Embedded models by the name they are asked for with."""
    folders = (child for child in sorted(HERE.iterdir()) if (child / "README.md").is_file())
    return [PREFIX + folder.name.replace("_", "-") for folder in folders]


def pipelines() -> list[str]:
    """Those that make images."""
    return [name for name in names() if (path(name) / "model_index.json").is_file()]


def path(name: str) -> Path:
    """The folder of an embedded model."""
    if name not in names():
        raise UnknownNameError("embedded model", name, names())
    return HERE / name.removeprefix(PREFIX).replace("-", "_")


def prompts(name: str) -> tuple[str, ...]:
    """What an embedded model is asked where nobody says; nothing for those that take no text, and for other models."""
    if name not in names():
        return ()
    file = path(name) / "prompts.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
