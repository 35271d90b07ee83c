"""This project: integers in a folder that diffusers loads."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from benchmarks.engines.given import Given
from benchmarks.engines.subject import PROMPT, STEPS, Network, Run, read, running
from stepquant import hub, quantize
from stepquant.fit.extremes import fit_extremes
from stepquant.job.parts import plan_for_parts
from stepquant.models.part import Part, Received, seen_by
from stepquant.quant.schemes import scheme as scheme_named

STATIC = "w8a8"
CALL = {"prompt": PROMPT, "guidance_scale": 1.0, "num_inference_steps": STEPS}


def prepare(given: Given, scheme: str = STATIC) -> None:
    """The denoiser by minmax, calibrated as the others are: on the calls of one picture; other networks on those recorded.

    What has a range for every row needs no calibration; text encoders, which transformers reads, stay float then.
    """
    if scheme != STATIC:
        options = (
            {} if given.network == "text_encoder" else {"quantization_config": hub.StepquantConfig(scheme)}
        )
        model = read(given.model, given.network, **options)
    elif given.network == "unet":
        pipe = DiffusionPipeline.from_pretrained(given.subject / "pipeline", dtype=torch.float32)
        settings = {"samples": STEPS, "trajectories": 1}
        quantize(pipe, method="minmax", scheme=STATIC, calls=[CALL], settings=settings)
        model = pipe.unet
    else:
        model = read(given.model, given.network)
        attach_part(model, given)
    model.save_pretrained(given.own)


def attach_part(model: torch.nn.Module, given: Given) -> None:
    entry = "decode" if given.network == "vae" else "forward"
    calls = [tuple(map(torch.from_numpy, one.values())) for one in given.calls()]
    received = [Received(entry, one, {"return_dict": False}) for one in calls]
    part = seen_by(Part(model, given.network), received)
    hub.attach(
        model, fit_extremes(part, plan_for_parts(scheme_named(STATIC)), [{"call": one} for one in received])
    )


def load(given: Given, scheme: str = STATIC) -> Run:
    torch.set_num_threads(given.threads)
    model = read(given.own, given.network, None)
    return running(Network(model, given.network))
