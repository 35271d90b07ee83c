"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.calib.cache import is_special
from stepquant.errors import StepquantError
from stepquant.models.call import Asked

DEFAULT_MODEL = "stepquant:characters"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Embedded model, or a diffusers pipeline folder.")
]
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_DIR", help="Embedded model, a pipeline folder, or an artifact.", show_default=False
    ),
]
ArtifactFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Artifact that `stepquant quantize` wrote.", show_default=False)
]

ArtifactOrFile = Annotated[
    Path,
    typer.Argument(
        metavar="DIR_OR_FILE",
        help="Artifact that `stepquant quantize` wrote, or a safetensors file for ComfyUI, a GGUF file, or a folder of SDNQ.",
        show_default=False,
    ),
]


def writable(file: Path | None) -> Path | None:
    """Before any work: a file that can be written, in a folder that is there or can be made."""
    if file is not None:
        there = next(folder for folder in (file.parent, *file.absolute().parents) if folder.exists())
        place = file if is_special(file) else there
        if file.is_dir() or not (place == file or place.is_dir()) or not os.access(place, os.W_OK):
            raise StepquantError(f"cannot write '{file}'", fix="choose another file")
    return file


def drawable(file: Path | None) -> Path | None:
    """The same for an image of any kind."""
    return ending(file, IMAGE_SUFFIXES)


def playable(file: Path | None) -> Path | None:
    """The same for what a pipeline makes: images, videos or sounds."""
    return ending(file, (*IMAGE_SUFFIXES, ".gif", ".wav"))


def ending(file: Path | None, suffixes: Sequence[str]) -> Path | None:
    if file is not None and file.suffix.lower() not in suffixes:
        raise StepquantError(
            f"cannot write images as '{file.name}'",
            expected=f"a name that ends in {', '.join(suffixes)}",
        )
    return writable(file)


Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON.", callback=writable),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", help="Seed of all randomness: one per trajectory follows from it.")
]
Memory = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="GB",
        help="For what flows through the blocks while they are fitted; the rest goes to disk, the result is the same.",
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="For models larger than memory: weights stay in their files, the result is the same. CPU, no card.",
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where torch computes.")]
Sampler = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="ddim, ddpm, dpm++, euler or unipc.", show_default="the pipeline's own"
    ),
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="One prompt per line, for models that take text.")
]

Calls = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A line of JSON for each call of the pipeline: its arguments, for what needs more than a prompt.",
    ),
]


def weights(metavar: str, text: str) -> Any:
    """The option for a network that measures."""
    where = "hub:OWNER/NAME" if metavar == "DIR" else "hub:OWNER/NAME/FILE"
    return typer.Option(metavar=metavar, help=f"{text} Or {where}.", show_default=False, parser=fetched)


def fetched(where: str) -> Path:
    from stepquant.evaluate.networks.weights import local

    return local(where)


def parts(where: str) -> Path:
    from stepquant.evaluate.metrics.parts import named

    return named(where)


Inception = Annotated[Path | None, weights("PATH", "InceptionV3 (safetensors), for FID, sFID, KID, IS.")]
Lpips = Annotated[Path | None, weights("PATH", "AlexNet or VGG16 with LPIPS heads (safetensors).")]
Clip = Annotated[Path | None, weights("DIR", "CLIP model (transformers folder), for its score.")]
Classifier = Annotated[
    Path | None,
    weights("DIR", "Classifier of your classes (examples/train_features.py), for distance and recognition."),
]
Truth = Annotated[
    Path | None,
    typer.Option(
        metavar="PARTS",
        help="The parts that images are composed of (.npz), or characters.",
        show_default="what the model saw",
        parser=parts,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Folder of real images, statistics (.npz with mu and sigma), characters, or cifar10.",
        show_default="what the model saw",
    ),
]
Method = Annotated[str, typer.Option(metavar="NAME", help="See `stepquant methods`.")]
Scheme = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="See `stepquant schemes`.", show_default="w8a8, or none with --plan"),
]
Auto = Annotated[
    bool,
    typer.Option(
        "--auto", help="Bits where they count: --scheme auto-4.5, a probed plan of 4.5 bits a weight."
    ),
]
BudgetBytes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Bits where they count, packed weights and scales within N bytes."),
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder to write.", show_default=False)
]
CalibrationSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Denoising steps of the calibration trajectories.",
        show_default="100, or those of --calls",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Denoising steps.", show_default="50, or those that the artifact knows"
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Calibration records.", show_default="the method's own")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A field of the method, repeatable. See `stepquant methods NAME`."
    ),
]
Components = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="What to quantize of the pipeline, by its folders: unet,text_encoder,vae.",
        show_default="the denoiser",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        metavar="STEPS",
        help="Steps whose activations stay in float, as first=3,last=3.",
        show_default="none",
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Rules (JSON) that come before those of --scheme, or stand alone."),
]
Fastest = Annotated[
    bool,
    typer.Option(
        "--fastest",
        help="Keep in bfloat16 what is slower in integers on this machine: timed once, and kept in the cache.",
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Print what every site gets and why; without --out, that is all.")
]
NoCard = Annotated[
    bool, typer.Option("--no-card", help="Write the artifact alone, without README.md and samples.png.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on after an interruption; keep a finished artifact of the same recipe."
    ),
]


def read_prompts(file: Path | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    try:
        lines = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(
            f"cannot read the prompts: {error}", expected="a text file with one prompt per line"
        ) from error
    if not lines:
        raise StepquantError("the file of prompts is empty", where=str(file), expected="one prompt per line")
    return lines


def read_asked(prompts: Path | None, calls: Path | None) -> tuple[Asked, ...]:
    """What a pipeline is asked for, in turn: prompts or calls."""
    if prompts is not None and calls is not None:
        raise StepquantError("--prompts and --calls say the same thing", fix="give one of them")
    if calls is None:
        return read_prompts(prompts) or ()
    from stepquant.job.calls import read_calls

    return read_calls(calls)


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` words; the method's fields give the values their types."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise StepquantError(f"cannot read --set {pair}", expected="key=value, as --set samples=512")
        if key.strip() in settings:
            raise StepquantError(f"--set {key.strip()} is given twice")
        settings[key.strip()] = read_value(value.strip())
    return settings


def read_value(text: str) -> Any:
    """Lists and tables as JSON; everything else stays text, which the field reads."""
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
        except RecursionError:
            raise StepquantError(
                "--set has lists in lists beyond all measure", got=f"{text[:40]}..."
            ) from None
    return None if text == "null" else text
