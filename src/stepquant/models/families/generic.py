"""Models that nobody declared: what their arguments mean by name, and what is a block by place."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from stepquant.models.families.family import Family

# Arguments of `forward` by what diffusers calls them, the usual word first.
INPUTS = (
    "hidden_states",
    "sample",
    "x",
    "latents",
    "*latent*",
    "*hidden_states",
    "*_tokens",
)
TIMES = ("timestep", "timesteps", "t", "timestep_*", "*_timestep", "*_timesteps", "*_time", "*sigma")
TEXTS = ("encoder_hidden_states*", "encoder_attention_mask*", "*text*", "*prompt*", "*cap_*", "*caption*")
NO_ROWS = (
    "*_ids",
    "indices_*",
    "*_indices",
    "*_indexes",
    "*rotary*",
    "*rope*",
    "*_kwargs",
    "*shapes",
    "num_*",
    "height",
    "width",
    "fps",
)
ELSE = ("return_dict", "self")


def generic(model: nn.Module) -> Family | None:
    """A family for `model` by its signature; None where that says no input or no time."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name not in ELSE]
    x = first([name for name in names if not any_of(name, TEXTS)], INPUTS)
    t = first(names, TIMES)
    if x is None or t is None:
        return None
    text = tuple(name for name in names if any_of(name, TEXTS) and name not in (x, t))
    shared = tuple(name for name in names if any_of(name, NO_ROWS) and name not in (x, t, *text))
    return Family(
        models=(type(model).__name__,),
        x=x,
        t=t,
        top={},
        blocks=blocks,
        component="unet" if ".unets." in type(model).__module__ else "transformer",
        text=text,
        cond=tuple(name for name in names if name not in (x, t, *text, *shared)),
        guidance="uncond, cond" if text else "none",
        shared=shared,
        generic=True,
    )


def blocks(model: nn.Module) -> Iterable[str]:
    """The elements of the lists that a model holds, in the order in which they were made."""
    lists = [name for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
    return [f"{name}.{i}" for name in lists for i, _ in enumerate(model.get_submodule(name).children())]


def first(names: Sequence[str], patterns: Iterable[str]) -> str | None:
    return next((name for pattern in patterns for name in names if fnmatchcase(name, pattern)), None)


def any_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
