"""What an engine is given: the float pipeline, the calls that were recorded of it, and a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PICTURE = "picture"
NETWORKS = ("unet", "vae", "text_encoder")
TESTED = {"unet": "unet-1", "vae": "vae-0", "text_encoder": "text_encoder-0", PICTURE: "picture-0"}


@dataclass(frozen=True)
class Given:
    """One network for one engine; `network` is the picture where all of them are meant."""

    subject: Path
    folder: Path  # of the engine
    network: str
    threads: int

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Given:
        return cls(Path(job["subject"]), Path(job["folder"]), job["network"], job["threads"])

    def named(self, network: str) -> Given:
        return replace(self, network=network)

    @property
    def model(self) -> Path:
        """The float network."""
        return self.subject / "pipeline" / self.network

    @property
    def own(self) -> Path:
        """What the engine made of the network."""
        return self.folder / self.network

    @property
    def test(self) -> Path:
        return self.subject / "test" / f"{TESTED[self.network]}.npz"

    def calls(self) -> list[dict[str, NDArray[Any]]]:
        """What calibrates: the calls of one picture."""
        files = sorted((self.subject / "calibration").glob(f"{self.network}-*.npz"))
        return [inputs_of(np.load(file)) for file in files]


def inputs_of(recorded: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: recorded[name] for name in recorded if name != "wanted"}


def relative_error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))
