"""`stepquant quantize` of a tiny model in forked processes, which need not import anything again."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler

from stepquant.cli import main
from tests.conftest import make_unet

# Without a search for ranges, which takes long and holds nothing that a kill could spoil.
MINMAX = ("--method", "minmax", "--steps", "10", "--samples", "64", "--set", "batch=8")
RECIPES = {
    "plain": MINMAX,
    "biases": (*MINMAX, "--set", "bias=true"),
}  # the second one keeps a journal of blocks


def make_model(folder: Path) -> Path:
    torch.set_num_threads(1)  # forked processes have no others
    DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder)
    return folder


def begin(model: Path, recipe: str, cache: Path, out: Path, *more: str) -> int:
    """Start it; the number of its process. What it says stands in a file beside `cache`."""
    words: Sequence[str] = ("quantize", str(model), *RECIPES[recipe], "--out", str(out), *more)
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line listens itself
        said = os.open(f"{cache}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.environ["STEPQUANT_CACHE"] = str(cache)
        code = main(words)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def artifact(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those that a folder takes its name with; its card comes later."""
    return {name: data for name, data in files.items() if name not in ("README.md", "samples.png")}


def undisturbed(model: Path, place: Path) -> dict[str, dict[str, bytes]]:
    """What each recipe makes alone."""
    made = {}
    for recipe in RECIPES:
        out = place / "alone" / recipe / "out"  # its model card has the name of the folder
        out.parent.mkdir(parents=True)
        assert wait(begin(model, recipe, out.with_name("cache"), out)) == 0
        made[recipe] = contents(out)
    return made


class Violations:
    """What did not hold, told at once and counted."""

    def __init__(self, what: str) -> None:
        self.what, self.count = what, 0

    def check(self, holds: bool, words: str) -> None:
        if not holds:
            self.count += 1
            print(f"{self.what}: VIOLATION: {words}", flush=True)
