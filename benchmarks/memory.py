"""What quantizing costs in memory and time: peak over the bytes of the float weights, and seconds.

    python -m benchmarks.memory --width 0.5 --latents 32,64
    python -m benchmarks.memory --network sdxl --latents 64 --dtype bf16
    python -m benchmarks.memory --network sdxl --latents 64 --dtype bf16 --scheme w8a8-dynamic --files 2
    python -m benchmarks.memory --network t5-xxl --latents 16 --dtype bf16 --scheme w8a8-dynamic --files 2

Weights are random, what stands beside the network is tiny. Every case runs in a process of its own: the float pipeline
alone, one image of a few steps with guidance, and `stepquant.quantize` of it with as many, whose artifact is saved. With
`--files GB` the pipeline is saved in place of the first, and quantized with `--low-memory` by a process that may take so
many GB. Peaks and this limit are beyond what imports take. Of files that are mapped, pages that the system keeps and may
drop are no part of them. T5-XXL's encoder goes to its files tensor by tensor, and is quantized beside a tiny denoiser.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

import stepquant
from benchmarks.pipelines import PIPELINES, TEXTS, save_text_encoder
from stepquant.calib.record import trajectory_seed
from stepquant.job import Recipe, quantize_to
from stepquant.job.memory import peak_bytes, reset_peak, resident_bytes, status_bytes
from stepquant.models.call import Call
from stepquant.models.denoiser import COMPONENTS, Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT = "text_encoder"
SAMPLING = ("counting steps", "recording trajectories", "recording calls of other parts")
QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
HEADS = (
    "network",
    "latents",
    "float GB",
    "",
    "peak GB",
    "over float",
    "sampling s",
    "all else s",
    "by the clock",
    "artifact GB",
)


class Phases:
    """Progress that adds up the seconds of each part of the work: those of the wall's clock and of the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        began = clocks()
        yield from items
        known = self.seconds.get(label, (0.0, 0.0))
        self.seconds[label] = [sum(each) - start for *each, start in zip(known, clocks(), began)]

    def note(self, words: str) -> None:
        return None


class OwnMemory(threading.Thread):
    """The most memory that is no page of a file, as it is seen twenty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = self.first = own_bytes()
        self.start()

    def run(self) -> None:
        while True:
            self.most = max(self.most, own_bytes())
            time.sleep(0.05)


def own_bytes() -> int:
    return status_bytes("RssAnon") or 0


class Case:
    """One row of the table, which a process measures in a folder."""

    def __init__(self, asked: dict[str, Any], folder: Path) -> None:
        self.asked, self.out = asked, folder / "quantized"
        self.saved, self.call = folder / "float", folder / "call.pt"
        self.phases, self.began, self.size = Phases(), clocks(), 0

    def measure(self, what: str) -> dict[str, Any]:
        """Peak and seconds of one of the ways below."""
        if self.asked["limit"]:
            resource.setrlimit(resource.RLIMIT_AS, (int(self.asked["limit"] * 1e9),) * 2)
        imports, own = resident_bytes(), OwnMemory()
        getattr(self, what)()
        seconds = [now - began for now, began in zip(clocks(), self.began)]
        peak = own.most - own.first if what == "quantize_files" else peak_bytes() - imports
        return {
            "bytes": self.size or weights_bytes(self.saved),
            "artifact": weights_bytes(self.out),
            "peak": peak,
            "seconds": seconds,
            "phases": self.phases.seconds,
        }

    def begin(self) -> None:
        reset_peak()
        self.began = clocks()

    def make(self) -> tuple[Any, dict[str, Any]]:
        """The pipeline, and what it is asked."""
        asked = self.asked
        width = {"width": asked["width"]} if asked["network"] == "sd1.5" else {}
        pipe, call = PIPELINES[asked["network"]](asked["latents"], DTYPES[asked["dtype"]], **width)
        if self.asked["network"] not in TEXTS:
            self.size = sum(value.nbytes for value in Denoiser.of(pipe).model.state_dict().values())
        return pipe, call

    def call_float(self) -> None:
        pipe, call = self.make()
        self.begin()
        run(pipe, [trajectory_seed(0, 0)], Sampling(self.asked["steps"], prompts=(Call.of(call),)))

    def save_float(self) -> None:
        pipe, call = self.make()
        self.begin()
        # In float32, as pipelines compute that are loaded from files; some want both alike.
        torch.save({k: v.float() if isinstance(v, torch.Tensor) else v for k, v in call.items()}, self.call)
        pipe.save_pretrained(self.saved)
        if self.asked["network"] in TEXTS:
            save_text_encoder(self.saved / TEXT, DTYPES[self.asked["dtype"]])

    def quantize(self) -> None:
        pipe, call = self.make()
        self.begin()
        stepquant.quantize(pipe, calls=[call], progress=self.phases, **self.how())
        for _ in self.phases.track([self.out], "saving"):
            pipe.save_pretrained(self.out)

    def quantize_files(self) -> None:
        limit = (status_bytes("VmData") or 0) + int(self.asked["files"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        recipe = Recipe.of(model=str(self.saved), calls=(Call.of(torch.load(self.call)),), **self.how())
        self.begin()
        quantize_to(recipe, self.out, low_memory=True, progress=self.phases)

    def how(self) -> dict[str, Any]:
        asked = {name: self.asked[name] for name in ("method", "scheme", "steps")}
        records = {"samples": asked["steps"], "trajectories": 1} if asked["method"] == "minmax" else {}
        beside = {"components": ["transformer", TEXT]} if self.asked["network"] in TEXTS else {}
        return asked | beside | {"settings": records}


def clocks() -> tuple[float, float]:
    """The wall's and the processor's."""
    return time.perf_counter(), time.process_time()


def in_its_own_process(what: str, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--case", json.dumps([what, asked]), "--folder", folder],
        stdout=subprocess.PIPE,
        env=os.environ | QUIET | {"STEPQUANT_CACHE": str(folder / "cache")},  # nothing is known from before
        text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def weights_bytes(folder: Path) -> int:
    """Of the denoiser in a pipeline's folder, and of its text encoder."""
    return sum(
        file.stat().st_size for name in (*COMPONENTS, TEXT) for file in (folder / name).glob("*.safetensors")
    )


def row(what: str, asked: dict[str, Any], folder: Path) -> str:
    found = in_its_own_process(what, asked, folder)
    wall, busy = found["seconds"]
    sampling = sum(found["phases"].get(label, (0, 0))[1] for label in SAMPLING)
    for label, seconds in found["phases"].items():
        print(f"{label}: {seconds[0]:.0f} s, {seconds[1]:.0f} of the processor", file=sys.stderr)
    cells = (
        asked["network"],
        asked["latents"],
        f"{found['bytes'] / 1e9:.2f}",
        what.replace("_", " "),
        f"{found['peak'] / 1e9:.2f}",
        f"{found['peak'] / found['bytes']:.2f}",
        f"{sampling:.0f}",
        f"{busy - sampling:.0f}",
        f"{wall:.0f}",
        f"{found['artifact'] / 1e9:.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=PIPELINES, default="sd1.5")
    add("--width", type=float, default=0.5, help="of the channels of sd1.5, as a share of the original's")
    add("--latents", default="32,64", help="of a side")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--method", default="minmax")
    add("--scheme", default="w8a8")
    add("--steps", type=int, default=2, help="of a single trajectory; minmax records every one of them")
    add("--files", type=float, default=0, help="with --low-memory, in so many GB")
    add("--limit", type=float, default=0, help="address space of each process in GB; 0: as much as there is")
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    if options.case:
        what, asked = options.case
        print(json.dumps(Case(asked, options.folder).measure(what)))
        return
    keys = ("network", "width", "dtype", "method", "scheme", "steps", "files", "limit")
    shared = {key: getattr(options, key) for key in keys}
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    ways = ("save_float", "quantize_files") if options.files else ("call_float", "quantize")
    for latents in map(int, options.latents.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            for what in ways:
                print(row(what, shared | {"latents": latents}, Path(folder)), flush=True)


if __name__ == "__main__":
    main(read_options())
