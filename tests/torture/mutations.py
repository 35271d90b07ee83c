"""Random damage to the denoiser of an artifact, and what loading makes of it: `--count N --seed S`.

Good is one StepquantError, or the same image as ever. Bad is another image without a word, any other exception, the
end of the process, and values that cannot be but are loaded. Damage marked as forged comes with digests that agree.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from stepquant.artifact import FORMATS
from stepquant.calib.record import Source
from stepquant.errors import StepquantError
from stepquant.job.pipelines import load
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from tests import crafted
from tests.models import tiny

STEPS, AT_ONCE, SECONDS = 2, 100, 600
ARTIFACTS = {"w8a8": {}, "w4a4": {}, "stepped": {"steps": True}}
JUNK: tuple[Any, ...] = (None, True, -1, 1.5, 10**12, "x", "", [], [[1]], {}, {"x": 1}, {"": [None]})
GOOD, BAD = ("refused", "same"), ("other", "believed", "crash")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Damage:
    """What is done to the tensors and the configuration, or to the bytes of one of the two files."""

    name: str
    change: Callable[[random.Random, dict[str, Any], Tensors], str]
    forged: bool = False  # with digests that agree
    must: bool = False  # be refused, whatever image it would give


def some(rng: random.Random, tensors: Tensors, *ends: str) -> str:
    return rng.choice(sorted(name for name in tensors if name.endswith(ends or "")))


def put(rng: random.Random, tensor: Tensor, value: float) -> None:
    tensor.view(-1)[rng.randrange(tensor.numel())] = value


def impossible(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    """One value that no artifact can hold."""
    kinds: list[tuple[tuple[str, ...], list[float]]] = [
        (("_scale",), [torch.nan, torch.inf, -torch.inf, -0.01, 0.0, 1e-42]),
        (("_zero_point",), [300, -300, 30000]),
        (("bias", "norm.weight", "norm1.weight", "norm_out.weight"), [torch.nan, torch.inf, -torch.inf]),
        (("steps.rows",), [99, -1, 2**31 - 1]),
        (("steps.table", "correction_bias"), [torch.nan, torch.inf]),
        (("correction_variance",), [torch.nan, -1.0]),
        (("steps.bits",), [-1, 0x7FF0000000000000]),
    ]
    ends, values = rng.choice([kind for kind in kinds if any(name.endswith(kind[0]) for name in tensors)])
    name, value = some(rng, tensors, *ends), rng.choice(values)
    if name.startswith("steps.correction_scale"):  # may be any finite number
        value = torch.nan
    put(rng, tensors[name], value)
    return f"{name}={value}"


def flip(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    """One bit: mostly still a number like any other."""
    name = some(rng, tensors)
    raw = tensors[name].view(-1).view(torch.uint8)
    at, bit = rng.randrange(raw.numel()), rng.randrange(8)
    raw[at] = int(raw[at]) ^ (1 << bit)
    return f"{name} byte {at} bit {bit}"


def scaled(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    name = some(rng, tensors, "_scale", "bias", ".weight")
    tensors[name] = (tensors[name] * rng.choice([0, 2, 1.001])).to(tensors[name].dtype)
    return name


def swap(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    name = some(rng, tensors)
    like = sorted(k for k, v in tensors.items() if v.shape == tensors[name].shape)
    other = rng.choice(like)
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{name} with {other}"


def retype(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    name = some(rng, tensors)
    kinds = [
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ]
    kind = rng.choice([kind for kind in kinds if kind != tensors[name].dtype])
    owner, _, leaf = name.rpartition(".")
    if kind == torch.float64 and leaf in ("weight", "bias") and f"{owner}.weight_scale" not in tensors:
        kind = torch.int64  # floats that are not packed may be of any kind
    tensors[name] = tensors[name].to(kind)
    return f"{name} as {kind}"


def reshape(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    name = some(rng, tensors)
    value = tensors[name]
    shapes = [
        value[:-1],
        value[None],
        torch.cat([value, value]),
        value.new_zeros(0),
        value.new_zeros(3, 5, 7),
    ]
    tensors[name] = rng.choice(shapes)
    return f"{name} as {tuple(tensors[name].shape)}"


def rename(rng: random.Random, _: dict[str, Any], tensors: Tensors) -> str:
    name = some(rng, tensors)
    value, way = tensors[name], rng.choice(["missing", "foreign", "renamed"])
    if way != "foreign":
        del tensors[name]
    if way != "missing":
        tensors[rng.choice([f"{name}.x", "x", "", "steps.more", name.upper()])] = value
    return f"{name} {way}"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything within, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in inner for found in places(item, (*path, key))]


def set_at(config: dict[str, Any], path: tuple[Any, ...], value: Any) -> str:
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return f"{'.'.join(map(str, path))}={value!r}"


def edit(rng: random.Random, config: dict[str, Any], _: Tensors) -> str:
    """Anything in config.json: another value of the same kind, nothing, or something else."""
    # Names of tensors are many and settings of the network few.
    top = rng.choice([config, {k: v for k, v in config.items() if k != "quantization_config"}])
    path = rng.choice(places(top))
    former: Any = config
    for key in path:
        former = former[key]
    near = {bool: not former, int: 2, float: 0.5, str: f"{former}x"}.get(type(former))
    if type(former) is int:
        near = former * 2
    return set_at(config, path, rng.choice([near, near, ..., rng.choice(JUNK)]))


def junk(rng: random.Random, config: dict[str, Any], _: Tensors) -> str:
    """Something senseless in `quantization_config`; what only tells the origin may be anything."""
    told = config["quantization_config"]
    described = {key: told[key] for key in ("layers", "products", "splits", "steps", "recipe")}
    top = rng.choice([key for key, value in described.items() if value])
    path = ("quantization_config", *rng.choice([(top,), *places(described[top], (top,))]))
    return set_at(config, path, rng.choice([..., *JUNK]))


DAMAGES = (
    Damage("impossible", impossible, forged=True, must=True),
    Damage("flip", flip),
    Damage("scaled", scaled),
    Damage("swap", swap),
    Damage("retype", retype),
    Damage("retype forged", retype, forged=True, must=True),
    Damage("reshape", reshape),
    Damage("reshape forged", reshape, forged=True, must=True),
    Damage("rename", rename),
    Damage("rename forged", rename, forged=True, must=True),
    Damage("edit", edit),
    Damage("junk forged", junk, forged=True),
)


def spoil_bytes(rng: random.Random, file: Path) -> str:
    """A file that ends early, or holds other bytes somewhere."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(rng.choice([len(data), min(len(data), 64)]))
    if rng.random() < 0.5:
        file.write_bytes(data[:at])
        return f"{file.name} ends at {at}"
    data[at] = rng.randrange(256)
    file.write_bytes(data)
    return f"{file.name} byte {at}"


def damage(rng: random.Random, folder: Path) -> tuple[str, bool]:
    """Damage the denoiser in `folder`; says how, and whether it has to be refused."""
    if rng.random() < 0.15:
        return spoil_bytes(rng, folder / rng.choice([crafted.CONFIG, crafted.WEIGHTS])), False
    config, tensors = crafted.read(folder)
    tensors = {name: value.clone() for name, value in tensors.items()}
    chosen = rng.choice(DAMAGES)
    words = chosen.change(rng, config, tensors)
    if chosen.forged:
        crafted.agree(config, tensors, rng.choice(FORMATS))
    crafted.write(folder, config, tensors)
    return f"{chosen.name}: {words}", chosen.must


def image(pipeline: Any) -> Tensor:
    return run(pipeline, [1], Sampling(STEPS))


def make(folder: Path) -> None:
    """The artifacts that are damaged, and the image of each."""
    for name, settings in ARTIFACTS.items():
        torch.manual_seed(0)
        pipe = DDIMPipeline(tiny.unconditional(), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        source = Source(pipe, Sampling(STEPS), batch=4, cache=folder / f"{name}-calibration")
        plan = name if name != "stepped" else "w8a8"
        crafted.save(source, folder / name, plan, **settings)
        torch.save(image(load(folder / name)), folder / f"{name}.pt")


def outcome(folder: Path, seed: int, index: int) -> tuple[str, str]:
    """What became of one damaged copy, and how it was damaged."""
    rng = random.Random(f"{seed}:{index}")
    name = rng.choice(sorted(ARTIFACTS))
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder / name, Path(place) / name))
        words, must = damage(rng, copy / "unet")
        words = f"{index} {name} {words}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = image(load(copy))
        except StepquantError as error:
            return "refused", f"{words}: {error.what}"
        except Exception as error:
            return "crash", f"{words}: {error!r:.300}"
    if must:
        return "believed", words
    return "same" if torch.equal(found, torch.load(folder / f"{name}.pt")) else "other", words


def part(folder: Path, seed: int, first: int, last: int) -> list[tuple[str, str]]:
    """Outcomes in a process of their own, which may end at any of them."""
    command = [sys.executable, "-m", __spec__.name, "--child", str(folder), str(first), str(last)]
    try:
        done = subprocess.run(
            [*command, "--seed", str(seed)], capture_output=True, text=True, timeout=SECONDS
        )
        said, end = done.stdout, f"ended with {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as late:
        said, end = (late.stdout or b"").decode(), f"took more than {SECONDS} s"
    found = [tuple(json.loads(line)) for line in said.splitlines() if line.endswith("]")]
    reached = first + len(found)
    if reached == last:
        return found  # type: ignore[return-value]
    return [*found, ("crash", f"{reached}: {end}"), *part(folder, seed, reached + 1, last)]  # type: ignore[list-item]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "FIRST", "LAST"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.child:
        folder, first, last = asked.child
        for index in range(int(first), int(last)):
            print(json.dumps(outcome(Path(folder), asked.seed, index)), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        found = [
            one
            for first in range(0, asked.count, AT_ONCE)
            for one in part(Path(place), asked.seed, first, min(first + AT_ONCE, asked.count))
        ]
    for kind, words in found:
        if kind in BAD:
            print(f"{kind}: {words}", file=sys.stderr)
    counts = Counter(kind for kind, _ in found)
    print(f"{len(found)} mutations: " + ", ".join(f"{counts[kind]} {kind}" for kind in (*GOOD, *BAD)))
    return 1 if any(counts[kind] for kind in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
