"""Time of one call of the denoiser: the quantized model and its baselines, each in its fastest form."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stepquant.core.precision import multiplies_bf16
from stepquant.errors import EvaluationError
from stepquant.evaluate.speed.peers import convolves, openvino_calls, peers_installed
from stepquant.evaluate.speed.turns import Call, interleave, summarize
from stepquant.models.call import Asked
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.hooks import first_arguments, listening
from stepquant.models.sampling import Sampling
from stepquant.progress import Progress, Silent

REFERENCE = "fp32 eager"
QUANTIZED = "stepquant"


@dataclass(frozen=True)
class Contender:
    """Something to time, or the reason why it cannot run here."""

    name: str
    call: Call | None
    layout: str = ""
    unavailable: str = ""


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """All contenders get the same number of threads."""
    former = torch.get_num_threads()
    torch.set_num_threads(count or former)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(former)


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """A tensor with a height and width, and maybe frames, in `layout`; others as they are."""
    if x.ndim == 5 and layout == torch.channels_last:
        layout = torch.channels_last_3d
    return x.contiguous(memory_format=layout) if x.ndim in (4, 5) else x


def cast(arguments: Mapping[str, Any], dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Any]:
    """Floating tensors in `dtype` and `layout`."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return laid_out(value.to(dtype), layout)

    return {name: tree_map(one, value) for name, value in arguments.items()}


def calling(model: Callable[..., Any], arguments: Mapping[str, Any]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return model(**arguments, return_dict=False)[0]

    return call


def twin_of(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    return settle(copy.deepcopy(model), dtype, layout).eval().requires_grad_(False)


def settle(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """The model itself in `dtype` and `layout`."""
    # Not `model.to`: that of diffusers warns at every change of type.
    nn.Module.to(model, dtype=dtype)
    for own in chain(model.parameters(), model.buffers()):
        own.data = laid_out(own.data, layout)
    return model


def layouts_of(model: nn.Module) -> tuple[torch.memory_format, ...]:
    """Both where images are convolved; linears know one."""
    return (torch.contiguous_format, torch.channels_last) if convolves(model) else (torch.contiguous_format,)


def in_layouts(model: nn.Module, arguments: Mapping[str, Any], dtype: torch.dtype) -> list[Contender]:
    """A copy of the model in `dtype`, with its weights as they are and channels-last."""
    out = []
    for layout in layouts_of(model):
        twin = twin_of(model, dtype, layout)
        name = "channels-last" if layout == torch.channels_last else "channels-first"
        out.append(Contender(name, calling(twin, cast(arguments, dtype, layout)), name))
    return out


def compiled_in_layouts(
    model: nn.Module, arguments: Mapping[str, Any], dtype: torch.dtype
) -> list[Contender]:
    """The model in `dtype` through torch.compile with frozen weights, in both layouts."""
    out = []
    for layout in layouts_of(model):
        twin = twin_of(model, dtype, layout)
        name = "channels-last" if layout == torch.channels_last else "channels-first"
        out.append(Contender(name, calling(frozen(twin), cast(arguments, dtype, layout)), name))
    return out


def frozen(model: nn.Module) -> Callable[..., Any]:
    """A model as torch.compile makes it when its weights are constants.

    Dynamo asks the configuration itself: as an option of torch.compile it comes too late, and nothing is frozen.
    """
    from torch._inductor import config

    compiled = torch.compile(model, dynamic=False)

    def call(*given: Any, **arguments: Any) -> Any:
        with config.patch(freezing=True):
            return compiled(*given, **arguments)

    return call


def best(name: str, make: Callable[[], list[Contender]]) -> Contender:
    """The fastest of several ways to run one baseline, or why none runs."""
    try:
        ways = {way.name: way for way in make()}
        calls = {key: way.call for key, way in ways.items() if way.call is not None}
        # Warnings of the compiler about diffusers' code do not help the reader of a benchmark.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for call in calls.values():
                call()
                call()
        # Where there is one, nothing is to be chosen.
        rounds = interleave(calls, seconds=0.5, fewest=3, most=20) if len(calls) > 1 else []
    except Exception as error:  # a compiler or a type that this machine lacks is a result, not a failure
        return Contender(name, None, unavailable=reason(error))
    fastest = next(iter(calls))
    if rounds:
        fastest = min(calls, key=lambda key: statistics.median(taken[key] for taken in rounds))
    return replace(ways[fastest], name=name)


def reason(error: BaseException) -> str:
    """The first line of the error; where it ends with a colon, as of a compiler that names its backend, the next one too."""
    lines = str(error).strip().splitlines() or [""]
    words = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {words[:200]}"


def trajectory(pipeline: Any, batch: int, prompts: Sequence[Asked], steps: int = 8) -> list[dict[str, Any]]:
    """The inputs of the denoiser along one float trajectory, with which NNCF calibrates."""
    calls: list[dict[str, Any]] = []
    with torch.no_grad(), listening(Denoiser.of(pipeline), lambda _, arguments: calls.append(arguments)):
        run(pipeline, list(range(batch)), Sampling(steps, prompts=tuple(prompts)))
    return calls


def peer(
    model: nn.Module,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    data: Sequence[Mapping[str, Any]] | None = None,
) -> list[Contender]:
    """OpenVINO on the float model in `dtype`, or on its INT8 form calibrated with `data` and in `dtype` elsewhere."""
    calls = openvino_calls(model, arguments, dtype, data, torch.get_num_threads())
    return [Contender(hint, call, hint) for hint, call in calls.items()]


def fastest_type() -> torch.dtype:
    """The float type in which this machine's baselines are at their best."""
    return torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32


def baselines_here(compiled: bool = True) -> tuple[str, ...]:
    """What is worth timing on this machine: fp32 eager, and all others in its fastest type; compiling takes minutes."""
    fast = "bf16" if fastest_type() == torch.bfloat16 else "fp32"
    eager = dict.fromkeys((REFERENCE, f"{fast} eager"))
    peers = (f"OpenVINO {fast}", "OpenVINO INT8") if peers_installed() else ()
    return (*eager, *((f"{fast} compiled",) if compiled else ()), *peers)


def contenders(
    pipeline: Any,
    arguments: Mapping[str, Any],
    batch: int,
    baselines: Sequence[str],
    prompts: Sequence[Asked] = (),
    progress: Progress | None = None,
) -> list[Contender]:
    model = Denoiser.of(pipeline).model
    makers: dict[str, Callable[[], list[Contender]]] = {
        "fp32 eager": lambda: in_layouts(model, arguments, torch.float32),
        "bf16 eager": lambda: in_layouts(model, arguments, torch.bfloat16),
        "fp32 compiled": lambda: compiled_in_layouts(model, arguments, torch.float32),
        "bf16 compiled": lambda: compiled_in_layouts(model, arguments, torch.bfloat16),
        "OpenVINO fp32": lambda: peer(model, arguments, torch.float32),
        "OpenVINO bf16": lambda: peer(model, arguments, torch.bfloat16),
        "OpenVINO INT8": lambda: peer(model, arguments, fastest_type(), trajectory(pipeline, batch, prompts)),
    }
    unknown = sorted(set(baselines) - set(makers))
    if unknown:
        raise EvaluationError(f"unknown baseline '{unknown[0]}'", expected=", ".join(makers))
    entered = []
    for name in baselines:
        (progress or Silent()).note(f"batch {batch}: preparing {name}")
        entered.append(best(name, makers[name]))
    return entered


def benchmark(
    float_pipeline: Any,
    quantized_pipeline: Any | None = None,
    *,
    batches: Sequence[int] = (1, 8, 32),
    baselines: Sequence[str] | None = None,
    seconds: float = 10.0,
    count: int | None = None,
    prompts: Sequence[Asked] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`speed` of the results: each baseline at its best, and the quantized model, in turns for `seconds` a batch size.

    count: threads for everyone; None keeps the present number.
    """
    if not batches or min(batches) < 1:
        raise EvaluationError("batch sizes are positive numbers", got=list(batches))
    baselines = baselines_here() if baselines is None else baselines
    rows: list[dict[str, Any]] = []
    played, progress = 0, progress or Silent()
    with threads(count) as used:
        for batch in progress.track(batches, "timing", len(batches)):
            arguments = first_arguments(float_pipeline, batch, prompts, quantized_pipeline)
            entered = contenders(float_pipeline, arguments, batch, baselines, prompts, progress)
            if quantized_pipeline is not None:
                other = Denoiser.of(quantized_pipeline).model
                entered.append(Contender(QUANTIZED, calling(other, arguments)))
            progress.note(f"batch {batch}: taking turns")
            rounds = play(entered, seconds)
            played = max(played, len(rounds))
            rows += [row(batch, one, rounds) for one in entered]
    return {"threads": used, "rounds": played, "reference": REFERENCE, "rows": rows}


def play(entered: Sequence[Contender], seconds: float) -> list[dict[str, float]]:
    calls = {one.name: one.call for one in entered if one.call is not None}
    if not calls:
        return []
    for call in calls.values():
        call()
        call()
    return interleave(calls, seconds)


def row(batch: int, one: Contender, rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    empty = dict.fromkeys(("milliseconds", "low", "high", "ratio", "ratio_low", "ratio_high"))
    measured = summarize(rounds, one.name, REFERENCE) if one.call is not None else {}
    return (
        {"batch": batch, "name": one.name, "layout": one.layout, "unavailable": one.unavailable}
        | empty
        | measured
    )
