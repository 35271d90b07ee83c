"""Hooks on a denoiser and its blocks: what goes in, what comes out, and an end of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stepquant.errors import ModelError
from stepquant.models.call import Asked, Call
from stepquant.models.denoiser import Denoiser, denoisers, prediction_of
from stepquant.models.generate import run
from stepquant.models.sampling import Enough, Sampling
from stepquant.models.tables import tables_of

CALL_STEPS = 50  # image-to-image makes a share of the steps that it is asked for: of so many, at least one

Listener = Callable[[int, dict[str, Any]], None]


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


@contextmanager
def context_names(model: Any) -> Iterator[list[str]]:
    """The names of the cache contexts that the model is in, the innermost last: how pipelines mark guidance branches."""
    names: list[str] = []
    own = getattr(model, "cache_context", None)

    @contextmanager
    def noting(name: str, **options: Any) -> Iterator[None]:
        names.append(name)
        try:
            with own(name, **options):  # type: ignore[misc]
                yield
        finally:
            names.pop()

    if own is None:
        yield names
        return
    before = vars(model).get("cache_context")
    model.cache_context = noting
    try:
        yield names
    finally:
        del model.cache_context
        vars(model).update({} if before is None else {"cache_context": before})


@contextmanager
def answering_noise(model: Any) -> Iterator[None]:
    """Let a model compute once for each form of arguments, and answer by noise of the form of what it made.

    Whoever asks it in a loop asks as often. Noise, because samplers of second order ask twice for one t, and what told
    these apart would be the same where all answers are.
    """
    own, before = model.forward, vars(model).get("forward")
    made: dict[Any, Any] = {}
    numbers = torch.Generator().manual_seed(0)

    def drawn(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return torch.randn(value.shape, generator=numbers).to(value) if floats else value

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        form = tuple(map(form_of, tree_leaves((args, kwargs))))
        if form not in made:
            made[form] = own(*args, **kwargs)
        return tree_map(drawn, made[form])

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        vars(model).update({} if before is None else {"forward": before})


def form_of(argument: Any) -> Any:
    """What stays as it is from step to step: the shape of a tensor, or a word."""
    if isinstance(argument, Tensor):
        return argument.shape
    return argument if isinstance(argument, str | bool) else type(argument)


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


def read_by(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is given to read, which some models name as torch does."""
    return args[0] if args else kwargs["input"]


@contextmanager
def removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def first_arguments(
    pipeline: Any, batch: int, prompts: Sequence[Asked] = (), quantized: Any = None
) -> dict[str, Any]:
    """What the pipeline's denoiser receives on the first step of a batch of images.

    A call that is written out makes one image, which then stands for all of the batch. Where `quantized`, or the
    pipeline itself, knows some t only, the t is the first of those; where it has steps in float, one of the others.
    """
    caught: dict[str, Any] = {}
    written = any(isinstance(one, Call) for one in prompts)

    def listener(_: int, arguments: dict[str, Any]) -> None:
        caught.update(arguments)
        raise Enough

    several = len(denoisers(pipeline)) > 1  # and some serve late steps alone
    sampling = Sampling(CALL_STEPS if written or several else 2, prompts=tuple(prompts))
    try:
        with torch.no_grad(), listening(Denoiser.of(pipeline), listener):
            run(pipeline, list(range(1 if written else batch)), sampling)
    except Enough:
        pass
    if not caught:
        name = Denoiser.of(pipeline).component
        raise ModelError(
            f"the pipeline never called its denoiser '{name}'", fix="ask for more steps, or for more strength"
        )
    denoiser = Denoiser.of(pipeline if quantized is None else quantized)
    if written:
        caught = widened(denoiser, caught, batch)
    tables = tables_of(denoiser.model)
    policy = vars(denoiser.model).get("policy")
    known = tables.times().times if tables is not None else torch.empty(0)
    if policy is not None:
        known = known[~policy(known, len(known))] if len(known) else torch.tensor([policy.middle])
    if len(known):
        t = torch.as_tensor(caught[denoiser.family.t])
        caught[denoiser.family.t] = torch.full_like(t, known[0].item())
    return caught


def widened(denoiser: Denoiser, arguments: dict[str, Any], batch: int) -> dict[str, Any]:
    """The arguments of one image for `batch` of them, branch by branch."""
    family = denoiser.family
    entries = len(arguments[family.x])

    def widen(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == entries
        return value.repeat_interleave(batch, 0) if has_rows else value

    return {
        name: value if name in family.shared else tree_map(widen, value) for name, value in arguments.items()
    }
