"""Calling a pipeline as its user would, with another scheduler for the time of the call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import ModelError, StepquantError, UnknownNameError
from stepquant.models.call import STEPS, Asked, Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.pipelines.modular import answer, guided_by, hide_bars, inputs_of, is_modular, lacking
from stepquant.models.pipelines.results import tensor_of
from stepquant.models.sampling import Enough, Sampling, check_steps, generators, scheduler_of

# Arguments that say where randomness and results go, and how many results: ours.
OURS = ("generator", "output_type", "return_dict", "callback_on_step_end", "callback", "batch_size")
# How much the condition counts. Where a pipeline has both, the second is an input of its network.
GUIDANCE = ("true_cfg_scale", "guidance_scale")
WRITE_CALLS = "write the arguments of each call into a file, a line of JSON each: quantize --calls FILE"


def results_of(pipeline: Any, seeds: Sequence[int], sampling: Sampling, **asked: Any) -> Tensor:
    """What the pipeline makes of what is asked, one generator a result."""
    accepted = accepted_by(pipeline)
    options = {STEPS: sampling.steps, "generator": generators(seeds), "output_type": "pt"}
    options = {name: value for name, value in options.items() if name in accepted} | asked
    with sampled_by(pipeline, sampling), torch.no_grad():
        return tensor_of(answer(pipeline, options) if is_modular(pipeline) else pipeline(**options))


def accepted_by(pipeline: Any) -> set[str]:
    """The names of its arguments."""
    if is_modular(pipeline):
        return inputs_of(pipeline)
    return set(inspect.signature(type(pipeline).__call__).parameters) - {"self", "kwargs"}


@contextmanager
def sampled_by(pipeline: Any, sampling: Sampling) -> Iterator[None]:
    """Another scheduler for a while; a pipeline sets its steps itself."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_of(pipeline, sampling.sampler)
    check_steps(pipeline.scheduler, sampling.steps)
    hide_bars(pipeline)
    try:
        yield
    finally:
        pipeline.scheduler = own


def results_of_text(pipeline: Any, seeds: Sequence[int], sampling: Sampling, words: Sequence[str]) -> Tensor:
    """What the pipeline makes of prompts alone, if that is all that it needs."""
    reached: list[Any] = []
    handle = Denoiser.of(pipeline).model.register_forward_pre_hook(lambda *_: reached.append(True))
    try:
        return results_of(pipeline, seeds, sampling, prompt=list(words))
    except (TypeError, ValueError, AttributeError) as error:
        if reached:  # the arguments were good
            raise
        raise ModelError(
            f"{type(pipeline).__name__} cannot be asked by a prompt alone",
            got=message_of(error),
            fix=WRITE_CALLS + lacking(pipeline),
        ) from error
    finally:
        handle.remove()


def result_of_call(pipeline: Any, seed: int, call: Call, sampling: Sampling) -> Tensor:
    """The one result (1, ...) of a call that is written out."""
    check_call(pipeline, call)
    denoiser = Denoiser.of(pipeline)
    try:
        made = results_of(pipeline, [seed], sampling, **call.there(denoiser.device, denoiser.dtype))
    except (StepquantError, Enough):
        raise
    except Exception as error:  # whatever a pipeline says about arguments that it was given
        raise ModelError(
            f"{type(pipeline).__name__} refuses {call.origin or 'a call'}",
            where=str(call),
            got=f"{type(error).__name__}: {message_of(error)}",
            fix="change the arguments of this call; they are those of the pipeline's own __call__"
            + lacking(pipeline),
        ) from error
    if len(made) != 1:
        raise ModelError(
            f"{call.origin or 'a call'} makes several results",
            where=str(call),
            got=len(made),
            expected="one",
            fix="write a call for each of them",
        )
    return made


def check_call(pipeline: Any, call: Call) -> None:
    """The pipeline has all these arguments, and none of them is ours."""
    accepted = accepted_by(pipeline)
    for name in call.arguments:
        if name in OURS:
            raise ModelError(
                f"'{name}' cannot stand in a call",
                where=call.origin,
                fix="leave it out: seeds decide the noise, and each call makes one result",
            )
        if name not in accepted:
            unknown = UnknownNameError("argument", name, accepted - set(OURS))
            raise ModelError(
                f"{type(pipeline).__name__} has no argument '{name}'",
                where=call.origin,
                expected=unknown.expected,
                fix=unknown.fix,
            )


def guidance_of(pipeline: Any, asked: Asked | None) -> float | None:
    """s, where the pipeline steps by u + s (c - u) of predictions without and with the condition; None where it has none."""
    if is_modular(pipeline):
        scale = guided_by(pipeline)
    else:
        accepted = inspect.signature(type(pipeline).__call__).parameters
        given = {name: parameter.default for name, parameter in accepted.items()}
        if isinstance(asked, Call):
            given |= asked.arguments
        scale = next((given[name] for name in GUIDANCE if name in given), None)
    return float(scale) if isinstance(scale, int | float) and scale > 1 else None


def message_of(error: Exception) -> str:
    """The first lines of what an error says."""
    return (str(error).strip() or type(error).__name__)[:400]
