"""Pipelines by name or folder, with errors that say what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModularPipeline
from diffusers.utils import is_transformers_available, logging

from stepquant import hub
from stepquant.errors import ModelError, StepquantError, UnknownNameError
from stepquant.hub.foreign.read import is_foreign
from stepquant.models import zoo
from stepquant.models.call import Asked, Call, steps_of
from stepquant.models.denoiser import COMPONENTS, Denoiser, check_finite, denoisers
from stepquant.models.pipelines.calling import check_call
from stepquant.models.pipelines.index import INDEXES, ORDINARY, index_of, read_index
from stepquant.models.pipelines.modular import hide_bars, load_parts
from stepquant.models.sampling import SAMPLERS, Sampling


def load(
    model: str | os.PathLike[str],
    device: str = "cpu",
    *,
    config: str | os.PathLike[str] | None = None,
    scheme: str | None = None,
    policy: str | None = None,
    steps: int | None = None,
) -> Any:
    """A pipeline by the name of an embedded model or by its folder; a quantized one runs in integers.

    The file of another program is read as `convert` reads it, which knows the other arguments, and nothing is written. With the
    folder of a pipeline as `config`, it is that pipeline, denoising by the network of the file; else it is this network.
    """
    steps = steps or STEPS
    if is_foreign(Path(model)):
        place = None if config is None else Path(config)
        return load_packed(Path(model), device, place, scheme, policy, steps)
    if config is not None or scheme is not None or policy is not None:
        raise StepquantError(
            f"'{model}' says itself what it is: a configuration and a scheme are for files of other programs",
            fix="leave them out; or stepquant.quantize(pipeline, scheme=...)",
        )
    folder = find_folder(str(model))
    for component in COMPONENTS:
        if is_foreign(folder / component):  # a folder in a pipeline's, by SDNQ
            name = name_of(str(model), folder)
            return load_packed(folder / component, device, folder, None, None, steps, name)
    return ready(open_pipeline(folder), name_of(str(model), folder), device)


def load_packed(*asked: Any) -> Any:
    from stepquant.job.foreign import load_file  # which imports this one

    return load_file(*asked)


def ready(pipeline: Any, name: str, device: str) -> Any:
    """A pipeline that can denoise, by a name of its own, on its device."""
    Denoiser.of(pipeline)  # it has one
    for network in denoisers(pipeline).values():
        if hub.config_of(network) is None:
            check_finite(network)
    rename(pipeline, name)
    hide_bars(pipeline)
    return move(pipeline, device)


def name_of(model: str, folder: Path) -> str:
    """What a pipeline is called in what is made of it: no path of this machine."""
    return model if model in zoo.names() else folder.resolve().name


def rename(pipeline: Any, name: str) -> None:
    """Call the pipeline and its parts by a name instead of the path on this machine, which would be saved with them."""
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin):
            part.register_to_config(_name_or_path=name)
        elif hasattr(part, "name_or_path"):
            part.name_or_path = name


def find_folder(name: str) -> Path:
    folder = zoo.path(name) if name in zoo.names() else Path(name)
    if not folder.exists():
        near = UnknownNameError("model", name, zoo.pipelines())
        hub_id = f"fetch it first: hf download {name} --local-dir DIR" if name.count("/") == 1 else None
        raise ModelError(
            f"there is no model '{name}'",
            expected=f"a diffusers pipeline folder, or one of {', '.join(zoo.pipelines())}",
            fix=near.fix or hub_id or "check the path",
        )
    if index_of(folder) is None:
        above = index_of(folder.parent) is not None
        raise ModelError(
            f"'{name}' is no diffusers pipeline",
            expected=f"a folder with {' or '.join(INDEXES)}, as pipeline.save_pretrained writes it",
            fix=f"give the folder above it: {folder.parent}" if above else None,
        )
    return folder


def open_pipeline(folder: Path, **parts: Any) -> Any:
    """The pipeline in a folder, with these parts in the place of its own."""
    try:
        hub.check_folder(folder)
        with without_bars():
            if not (folder / ORDINARY).is_file():
                return load_parts(ModularPipeline.from_pretrained(str(folder), local_files_only=True), parts)
            pipeline = kind_in(folder).from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                **absent_in(folder) | parts,
            )
        keep_options(pipeline, folder)
        return pipeline
    except StepquantError:
        raise
    except Exception as error:  # whatever diffusers stumbles over in files that it does not check
        words = str(error).strip().splitlines() or [type(error).__name__]
        pickled = any(folder.rglob("*.bin"))
        raise ModelError(
            "diffusers cannot load this pipeline",
            where=str(folder),
            got=words[0][:300],
            fix="pickled weights (.bin) are never loaded: load them with diffusers where you trust them, and save_pretrained again"
            if pickled
            else "check that every file is there and complete",
        ) from error


def absent_in(folder: Path) -> dict[str, None]:
    """Parts that a pipeline was saved without, as the largest of its text encoders: diffusers must be told again."""
    return {name: None for name, entry in read_index(folder).items() if entry == [None, None]}


def kind_in(folder: Path) -> Any:
    """The class of a pipeline: asked of any pipeline, diffusers would load optional parts that it is given, too."""
    kind = getattr(diffusers, str(read_index(folder).get("_class_name")), None)
    return kind if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) else DiffusionPipeline


def keep_options(pipeline: Any, folder: Path) -> None:
    """What a pipeline was built with besides its parts is saved with it again; DiTPipeline would forget its labels."""
    index = read_index(folder)
    options = {name: value for name, value in index.items() if not isinstance(value, list) and name[0] != "_"}
    pipeline.register_to_config(**{n: value for n, value in options.items() if n not in pipeline.config})


@contextmanager
def without_bars() -> Iterator[None]:
    """diffusers and transformers draw a bar while they load and save, even for a fraction of a second."""
    libraries = [logging]
    if is_transformers_available():
        from transformers.utils import logging as transformers_logging

        libraries.append(transformers_logging)
    shown = [(library, library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, bars, verbosity in shown:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


# Denoising steps where nobody asks for another number.
STEPS = 50


def prompts_of(config: hub.StepquantConfig) -> tuple[Asked, ...]:
    """What an artifact was calibrated with: those that were given, or what its embedded model brings.

    Calls come back without what was in their pictures and tensors, which is enough to know what shapes they lead to.
    """
    calls = config.recipe.get("calls") or ()
    written = tuple(Call.from_json(one, f"call {place}") for place, one in enumerate(calls, 1))
    return written or tuple(config.recipe.get("prompts") or zoo.prompts(str(config.recipe.get("model"))))


def calibrated_with(config: hub.StepquantConfig) -> Sampling:
    """How the trajectories were sampled that an artifact was calibrated on."""
    sampler = config.recipe.get("sampler")
    return Sampling(
        config.recipe.get("steps", STEPS), sampler if sampler in SAMPLERS else None, prompts_of(config)
    )


def sampling_of(
    pipeline: Any,
    steps: int | None = None,
    sampler: str | None = None,
    prompts: Sequence[Asked] | None = None,
) -> Sampling:
    """How to sample: what is given, or what suits an artifact; one with tables by step has those steps only."""
    config = hub.config_of(Denoiser.of(pipeline).model)
    suits = Sampling(STEPS) if config is None else calibrated_with(config)
    if config is not None and not config.steps:
        suits = Sampling(STEPS, prompts=suits.prompts)
    asked = tuple(prompts or suits.prompts)
    for call in asked:
        check_written(pipeline, call)
    return Sampling(steps_of(asked, steps) or suits.steps, sampler or suits.sampler, asked)


def check_one_denoiser(pipeline: Any) -> None:
    """Studies look at one network; a second one would stay as it is without a word."""
    names = list(denoisers(pipeline))
    if len(names) > 1:
        raise ModelError(
            f"{type(pipeline).__name__} denoises with {len(names)} networks: {', '.join(names)}",
            expected="a pipeline with one, where several variants or sites are compared",
            fix="quantize and evaluate it: these take all of its networks",
        )


def check_written(pipeline: Any, asked: Asked) -> None:
    """A call that the pipeline can be asked by."""
    if isinstance(asked, Call):
        if asked.stands_in:
            raise StepquantError(
                "only the sizes of the pictures and tensors in these calls are known, and not what is in them",
                where=f"{asked.origin}: {asked}",
                fix="give them again: --calls FILE",
            )
        check_call(pipeline, asked)


def move(pipeline: Any, device: str) -> Any:
    try:
        torch.ones(1, device=device).sum().item()  # there are devices that only know shapes
        return pipeline if torch.device(device).type == "cpu" else pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        words = str(error).splitlines()[0]
        raise StepquantError(
            f"cannot use device '{device}'", got=words, expected="a device of this torch, as cpu"
        ) from error
