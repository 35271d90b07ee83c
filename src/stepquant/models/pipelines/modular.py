"""Modular pipelines of diffusers: blocks over parts, asked by the inputs of those blocks, answering with a state."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline
from diffusers.modular_pipelines import modular_pipeline
from torch import nn

from stepquant.models.pipelines.index import MODULAR, read_index

PAIR = 2  # library and class, which stand before it
ORIGIN = "pretrained_model_name_or_path"  # of a part, in the index
LOG = logging.getLogger(modular_pipeline.__name__)


def is_modular(pipeline: Any) -> bool:
    return isinstance(pipeline, ModularPipeline)


def inputs_of(pipeline: Any) -> set[str]:
    """What its blocks can be given, alone or as a table of several."""
    return {name for one in pipeline.blocks.inputs for name in (one.name, one.kwargs_type) if name}


def outputs_of(pipeline: Any) -> set[str]:
    """What its blocks say that they make, without what passes between them."""
    return {one.name for one in pipeline.blocks.outputs}


def answer(pipeline: Any, given: Mapping[str, Any]) -> SimpleNamespace:
    """What its blocks make of what they are given."""
    if unknown := sorted(set(given) - inputs_of(pipeline)):  # of which it would only warn
        raise TypeError(f"no block has an input '{unknown[0]}'")
    with unlogged():
        state = pipeline(**given)
    return SimpleNamespace(**{name: state.get(name) for name in outputs_of(pipeline)})


@contextmanager
def unlogged() -> Iterator[None]:
    """Each block writes down what is raised in it, which here is told once, or ends a recording early and is no error."""
    before, LOG.disabled = LOG.disabled, True
    try:
        yield
    finally:
        LOG.disabled = before


def hide_bars(pipeline: Any) -> None:
    """No bar of its own; diffusers tells the outermost blocks of a modular pipeline alone."""
    pipeline.set_progress_bar_config(disable=True)
    waiting = [pipeline._blocks] if is_modular(pipeline) else []  # `blocks` is a copy
    while waiting:
        block = waiting.pop()
        waiting += block.sub_blocks.values()
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def lacking(pipeline: Any) -> str:
    """What may be why it refuses a call: parts that it can have and has not."""
    names = pipeline.null_component_names if is_modular(pipeline) else []
    return f"; or give it what it was loaded without: {', '.join(names)}" if names else ""


def guided_by(pipeline: Any) -> float | None:
    """The scale of a guider that adds the difference of its branches to the one without the condition; None for any other."""
    guider: Any = getattr(pipeline, "guider", None)
    plain = type(guider) is ClassifierFreeGuidance
    if not plain or guider.num_conditions == 1:
        return None
    scale = float(guider.guidance_scale)
    return scale + 1 if guider.use_original_formulation else scale  # c + s (c - u) there


def load_parts(pipeline: Any, given: Mapping[str, Any]) -> Any:
    """Every part whose files are on this machine, or that is given; parts of elsewhere stay absent.

    diffusers' `load_components` would write down what is wrong with a part, and go on without it.
    """
    for name in pipeline.pretrained_component_names:
        part = given[name] if name in given else loaded(pipeline.get_component_spec(name))
        if part is not None:
            pipeline.register_components(**{name: part})
    return pipeline


def loaded(spec: Any) -> Any:
    origin = spec.pretrained_model_name_or_path
    if origin is None or not (Path(origin) / (spec.subfolder or "")).is_dir():
        return None
    weights = isinstance(spec.type_hint, type) and issubclass(spec.type_hint, nn.Module)
    # transformers would load a network in the dtype of its file.
    options = {"use_safetensors": True, "dtype": torch.float32} if weights else {}
    return spec.load(local_files_only=True, **options)


def save(pipeline: Any, folder: Path, called: str) -> None:
    """Save any pipeline, which is to be found under a name of its own; its modular index would name places of this machine."""
    if not is_modular(pipeline):
        pipeline.save_pretrained(folder)
        return
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    write_index(read_index(folder), folder / MODULAR, called)


def write_index(index: dict[str, Any], file: Path, called: str) -> None:
    """The index of a pipeline, beside its parts; that of a modular one names `called` as their place."""
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) > PAIR}
    for name, entry in entries.items():
        here, origin = (file.parent / name).is_dir(), entry[PAIR][ORIGIN]
        entry[PAIR][ORIGIN] = called if here else None if origin and Path(origin).exists() else origin
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
