"""Hooks on a denoiser and its blocks: what goes in, what comes out, and an end of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.denoiser import Denoiser, prediction_of
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from stepquant.models.tables import tables_of

Listener = Callable[[int, dict[str, Any]], None]


class Enough(Exception):  # noqa: N818 - it ends a sampling loop early, it is no error
    """All wanted steps of the running batch have been seen."""


@contextmanager
def listening(denoiser: Denoiser, listener: Listener) -> Iterator[None]:
    """Call `listener(call index, arguments by name)` before every forward of the denoiser."""
    calls = 0

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        listener(calls, denoiser.bind(args, kwargs))
        calls += 1

    handle = denoiser.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


OutputListener = Callable[[int, dict[str, Any], Tensor], None]


@contextmanager
def after_calls(denoiser: Denoiser, listener: OutputListener) -> Iterator[None]:
    """Call `listener(call index, arguments by name, prediction)` after every forward of the denoiser."""
    calls = 0

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal calls
        calls += 1
        listener(calls - 1, denoiser.bind(args, kwargs), prediction_of(out))

    handle = denoiser.model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def block_outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The latest output of each block that the model calls, as float; blocks that the model lacks stay absent."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(path: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, out: Any) -> None:
            value = out[0] if isinstance(out, tuple) else out
            if isinstance(value, Tensor) and value.is_floating_point():
                # A copy: integer blocks add later results into tensors that nobody else reads.
                found[path] = value.detach().clone()

        return hook

    with ExitStack() as stack:
        for path in paths:
            if path in modules:
                stack.enter_context(removing(modules[path].register_forward_hook(keep(path))))
        yield found


@contextmanager
def removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def first_arguments(
    pipeline: Any, batch: int, prompts: Sequence[str] = (), quantized: Any = None
) -> dict[str, Any]:
    """What the pipeline's denoiser receives on the first step of a batch of images.

    Where `quantized`, or the pipeline itself, knows some t only, the t is the first of those.
    """
    caught: dict[str, Any] = {}

    def listener(_: int, arguments: dict[str, Any]) -> None:
        caught.update(arguments)
        raise Enough

    try:
        with torch.no_grad(), listening(Denoiser.of(pipeline), listener):
            run(pipeline, list(range(batch)), Sampling(2, prompts=tuple(prompts)))
    except Enough:
        pass
    denoiser = Denoiser.of(pipeline if quantized is None else quantized)
    tables = tables_of(denoiser.model)
    if tables is not None:
        t = torch.as_tensor(caught[denoiser.family.t])
        caught[denoiser.family.t] = torch.full_like(t, tables.times().times[0].item())
    return caught
