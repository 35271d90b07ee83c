"""Quantize into a folder that appears whole or not at all, and find again what is there already."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from stepquant import hub
from stepquant.calib.cache import cache_folder
from stepquant.calib.record import MEMORY
from stepquant.core.freed import large_ones_apart
from stepquant.core.mapped import copied
from stepquant.errors import ArtifactError, StepquantError
from stepquant.job.files import is_taken, new_folder, writing
from stepquant.job.in_files import load_in_files
from stepquant.job.inplace import attach_all, run_all
from stepquant.job.parts import parts_of
from stepquant.job.passing import passes, passings_of, quantize_files
from stepquant.job.pipelines import find_folder, load, name_of, without_bars
from stepquant.job.recipe import Recipe
from stepquant.job.tensors import is_saved, narrow_tables, weights_in
from stepquant.models.denoiser import Denoiser, by_denoiser, denoisers
from stepquant.models.pipelines.modular import save
from stepquant.progress import Progress, Silent


@dataclass(frozen=True)
class Outcome:
    """An artifact on disk."""

    out: Path
    recipe: Mapping[str, Any]
    weights_bytes: int
    float_bytes: int  # of the same weights in fp32
    found: bool  # whether it had been there before
    parts: Mapping[str, tuple[int, int]] = field(
        default_factory=dict
    )  # the same two of what stands beside it

    @property
    def share(self) -> float:
        return self.weights_bytes / self.float_bytes


def quantize_to(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    memory: int = MEMORY,
    low_memory: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Write the artifact of `recipe` to the folder `out`.

    With `resume`, a finished artifact of the same recipe is kept as it is, and an interrupted run goes on from the
    trajectories that it has recorded; the bytes are those of an uninterrupted run. `memory`: see `inplace.run`.
    The folder is then complete; a model card comes into it by `stepquant.write_card`, if it is to have one.
    With `low_memory` the same bytes are written while the weights of networks stay in their files; where no call of them is
    needed they pass from file to file, and nothing else of the pipeline is loaded.
    """
    recipe.check()
    target, progress = Path(out), progress or Silent()
    if low_memory and passes(recipe):
        return pass_to(recipe, target, resume, progress)
    if low_memory:
        pipeline = load_in_files(recipe.model, recipe.device, progress)
    else:
        pipeline = load(recipe.model, recipe.device)
    parts = {one.component: fp32_bytes(one.model) for one in parts_of(pipeline, recipe.components)}
    made_by, networks = [recipe.provenance(one) for one in by_denoiser(pipeline)], denoisers(pipeline)
    float_bytes = sum(fp32_bytes(network) for network in networks.values())

    def outcome(made: Mapping[str, Any], found: bool) -> Outcome:
        return Outcome(
            target, made, weights_bytes(target, networks), float_bytes, found, beside(target, parts)
        )

    if is_taken(target):
        return outcome(existing(target, made_by, resume), found=True)
    with new_folder(target) as folder:
        with large_ones_apart() if low_memory else nullcontext():
            made = run_all(pipeline, recipe, progress, memory=memory, made_by=made_by)
        keep_types(networks, find_folder(recipe.model), on_disk=low_memory)
        attach_all(pipeline, made, idle=made if low_memory else ())
        with writing(target), without_bars():
            save(pipeline, folder, target.name)
    return outcome(made_by[0], found=False)


def keep_types(networks: Mapping[str, nn.Module], source: Path, *, on_disk: bool) -> None:
    """Tables that no artifact changes are saved in the types of the files that they come from."""
    for component, network in networks.items():
        if is_saved(source / component):
            for name, kind in narrow_tables(network, weights_in(source / component)).items():
                path, _, leaf = name.rpartition(".")
                owner = network.get_submodule(path)
                table = owner.get_buffer(leaf)
                owner._buffers[leaf] = copied(table, cache_folder(), kind) if on_disk else table.to(kind)


def pass_to(recipe: Recipe, target: Path, resume: bool, progress: Progress) -> Outcome:
    """`quantize_to` with little memory."""
    source = find_folder(recipe.model)
    passings = passings_of(recipe, source)
    float_bytes = sum(fp32_bytes(one.model) for one in passings)
    found = is_taken(target)
    if found:
        wanted = [one.wanted(progress) for one in passings] if resume else []
        made = existing(target, wanted, resume)
    else:
        with new_folder(target) as folder, writing(target):
            name = name_of(recipe.model, source)
            made = quantize_files(passings, source, folder, target.name, name, progress)[0]
    written = weights_bytes(target, [one.component for one in passings])
    return Outcome(target, made, written, float_bytes, found)


def fp32_bytes(model: nn.Module) -> int:
    return sum(4 * value.numel() for value in model.state_dict().values())


def beside(folder: Path, parts: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Bytes on disk and in fp32 of the networks beside the denoiser."""
    return {name: (weights_bytes(folder, [name]), size) for name, size in parts.items()}


def existing(out: Path, wanted: Sequence[Mapping[str, Any]], resume: bool) -> Mapping[str, Any]:
    """The recipe of the artifact in `out`, which must be intact and the wanted one, for each of its denoisers."""
    if not resume:
        raise StepquantError(
            f"'{out}' exists already",
            expected="a new or empty folder",
            fix="choose another --out, or add --resume to keep a finished artifact of the same recipe",
        )
    found = [check_same(out, one, mine) for one, mine in zip(by_denoiser(load(out)), wanted, strict=True)]
    return found[0]


def check_same(out: Path, pipeline: Any, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    config = hub.config_of(Denoiser.of(pipeline).model)
    if config is None:
        raise ArtifactError(
            f"'{out}' holds a float model", expected="an artifact of stepquant", fix="choose another --out"
        )
    mine, theirs = (json.loads(json.dumps(recipe)) for recipe in (wanted, config.recipe))
    mine |= {name: mine.get(name) for name in ("components", "policy")}
    different = [key for key in mine if key not in ("versions", "model") and mine[key] != theirs.get(key)]
    if different:
        key = different[0]
        raise ArtifactError(
            f"'{out}' was made by another recipe: {', '.join(different)}",
            got=f"{key} {shorten(theirs.get(key))}",
            expected=f"{key} {shorten(mine[key])}",
            fix="choose another --out, or remove the folder",
        )
    return config.recipe


def shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def weights_bytes(folder: Path, components: Iterable[str]) -> int:
    """Size of the weights of these components on disk, by what the pipeline calls them."""
    return sum(file.stat().st_size for name in components for file in (folder / name).glob("*.safetensors"))
