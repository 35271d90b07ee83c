"""Files that other programs wrote: what they hold, and the folder of a network made of one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stepquant import hub
from stepquant.calib.times import times_of
from stepquant.core.policy import FloatSteps, StepPolicy
from stepquant.errors import StepquantError
from stepquant.hub.config import Name, StepquantConfig
from stepquant.hub.foreign.convert import network_of
from stepquant.hub.foreign.network import ForeignFile, ForeignLayer
from stepquant.hub.foreign.read import packed_by, read
from stepquant.hub.foreign.sdnq import CONFIG
from stepquant.hub.foreign.settings import denoiser_in, read_settings, settings_of
from stepquant.hub.foreign.single_file import running
from stepquant.job.files import is_taken, new_folder, writing
from stepquant.job.pipelines import STEPS, move, open_pipeline, ready, without_bars
from stepquant.models.denoiser import Denoiser
from stepquant.models.families.registry import family_of
from stepquant.models.pipelines.index import index_of
from stepquant.models.sampling import Sampling
from stepquant.runtime.layers.layer import IntegerLayer


@dataclass(frozen=True)
class Converted:
    """A folder that was written, and the recipe in it."""

    folder: Path
    recipe: Mapping[str, Any]
    layers: int  # whose weights are integers
    bytes: int


def convert(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    scheme: str | None = None,
    policy: str | None = None,
    steps: int = STEPS,
) -> Converted:
    """Write the network in `file` as a folder that `from_pretrained` of its class loads, in the file's own integers.

    `config` is the config.json of the float network in diffusers' format, or a folder that holds it; a folder needs none.
    Without a `scheme` nothing is rounded. With one that needs no calibration, layers that it multiplies in integers are: those that
    have a scale by the row in the file keep its integers, and all others are rounded. `policy` says which steps keep activations
    in float, as `first=3,last=3`: `config` is then the folder of a pipeline, whose sampler is followed over so many `steps`.
    """
    target = Path(out)
    if is_taken(target):
        raise StepquantError(f"'{out}' is there already", fix="choose another --out, or remove it")
    found, place = read(Path(file)), None if config is None else Path(config)
    with new_folder(target) as folder:
        timed = float_steps(found, place, scheme, policy, steps)
        model = network_of(found, place, scheme, timed)
        with writing(target), without_bars():
            model.save_pretrained(folder)
    told = model.hf_quantizer.quantization_config
    size = sum(one.stat().st_size for one in target.glob("*.safetensors"))
    return Converted(target, told.recipe, len(told.layers), size)


def load_file(
    file: Path,
    device: str,
    config: Path | None,
    scheme: str | None,
    policy: str | None = None,
    steps: int = STEPS,
    name: str | None = None,
) -> Any:
    """The network of a file in the file's own integers; or its pipeline, where `config` is the folder of one."""
    found = read(file)
    network = running(found, settings_of(found, config), scheme)
    asked = asked_policy(found, network, policy)
    if config is None or index_of(config) is None:
        if asked is not None:
            raise no_sampler(found, asked[0])
        return move(network, device)
    pipeline = open_pipeline(config, **{denoiser_in(config): network})
    made = ready(pipeline, name or file.stem, device)
    if asked is not None:
        times = times_of(made, Sampling(steps))
        hub.keep_in_float(network, FloatSteps.of(*asked, times))
    return made


def float_steps(
    found: ForeignFile, config: Path | None, scheme: str | None, policy: str | None, steps: int
) -> FloatSteps | None:
    """The steps that `load_file` would keep in float."""
    if found.policy is None and policy is None:
        return None
    made = load_file(found.file.path, "cpu", config, scheme, policy, steps)
    network = made if isinstance(made, nn.Module) else Denoiser.of(made).model
    return vars(network).get("policy")


def asked_policy(found: ForeignFile, network: Any, policy: str | None) -> tuple[StepPolicy, str] | None:
    """What was asked for, or else what the file says; nothing where activations are in float at every step anyway."""
    component = family_of(network).component
    asked = found.policy if policy is None else (StepPolicy.parse(policy), component)
    if asked is None or any(isinstance(one, IntegerLayer) and one.integer for one in network.modules()):
        return asked
    if policy is None:
        return None
    raise StepquantError(
        "activations are in float at every step: a policy would change nothing",
        where=str(found.file.path),
        got=str(asked[0]),
        fix="leave the policy out, or ask for a scheme with activations in integers, as w8a8-dynamic",
    )


def no_sampler(found: ForeignFile, policy: StepPolicy) -> StepquantError:
    return StepquantError(
        "a policy counts the steps of a sampler, and a network knows its t alone",
        where=str(found.file.path),
        got=str(policy),
        expected="the folder of a pipeline as its configuration, whose sampler is followed",
        fix="give the folder with model_index.json as --config",
    )


def inspect_file(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself, and what of it would run in integers here."""
    found = read(Path(file))
    rows = [row_of(layer) for layer in found.layers.values()]
    return {
        "file": str(file),
        "program": found.program,
        "dialect": found.dialect,
        "formats": counted(row["format"] for row in rows),
        "rotations": counted(str(row["rotation"]) for row in rows if row["rotation"]),
        "floats": len(found.floats),
        "policy": None if found.policy is None else str(found.policy[0]),
        "others": found.file.others,
        "layers": rows,
    }


def inspect_network(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Where the integers of a network came from that lies alone in a folder, and how its layers are stored."""
    settings = read_settings(Path(folder) / "config.json")
    config = StepquantConfig.from_dict(settings[CONFIG])
    config.check_settings(settings, str(folder))
    layers = config.artifact.layers
    rows = [{"path": path, "input": "float"} | layers[path].to_json() for path in sorted(layers)]
    return {
        "folder": str(folder),
        "class": settings.get("_class_name", ""),
        "digest": config.digest,
        "recipe": config.recipe,
        "policy": None if config.artifact.policy is None else str(config.artifact.policy.policy),
        "layers": rows,
    }


def is_network(folder: Path) -> bool:
    """Whether it holds one network packed here, and no pipeline around it."""
    return packed_by(folder) == Name.STEPQUANT.value and index_of(folder) is None


def counted(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


def row_of(layer: ForeignLayer) -> dict[str, Any]:
    return {
        "path": layer.path,
        "format": layer.format,
        "shape": list(layer.shape),
        "scales": layer.shared,
        "rotation": layer.rotation,
        "kept": layer.integer,  # its integers
        "integer": not layer.why_no_product,
        "reason": layer.why_no_product,
    }
