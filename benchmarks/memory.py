"""What quantizing a Stable Diffusion 1.5 costs in memory and time: peak over the bytes of its float weights, and seconds.

    python -m benchmarks.memory --width 0.5 --latents 32,64
    python -m benchmarks.memory --width 1 --latents 64 --dtype bf16

Weights are random, the text encoder and the autoencoder tiny. Every case runs in a process of its own: the float pipeline
alone, one image of a few steps with guidance, and `stepquant.quantize` of it with as many. Peaks are beyond what imports take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import stepquant
from stepquant.calib.record import trajectory_seed
from stepquant.job.memory import peak_bytes, reset_peak, resident_bytes
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "a"


def text_encoder(width: int) -> tuple[Any, Any]:
    """A tokenizer of one letter, and an encoder with a single narrow layer between embeddings of that width."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    config = transformers.CLIPTextConfig(vocab_size=4, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    return tokenizer, transformers.CLIPTextModel(config).eval()


def unet(width: float, latents: int) -> Any:
    """The U-Net with its channels times `width`, and random weights."""
    with torch.device("meta"):
        model = UNet2DConditionModel(
            sample_size=latents,
            block_out_channels=tuple(round(channels * width) for channels in (320, 640, 1280, 1280)),
            attention_head_dim=8,
            cross_attention_dim=768,
            norm_num_groups=math.gcd(32, round(320 * width)),
        )
    return drawn(model)


def drawn(model: Any) -> Any:
    """A model without storage, with random weights that keep the size of what they multiply."""
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=math.sqrt(1 / value[0].numel()), generator=generator)
            else:
                value.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval()


def pipeline_of(width: float, latents: int, dtype: torch.dtype) -> Any:
    tokenizer, encoder = text_encoder(768)
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae.eval().to(dtype),
        encoder.to(dtype),
        tokenizer,
        unet(width, latents).to(dtype),
        DDIMScheduler(clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Peak and seconds of one case in this process."""
    if case["limit"]:
        resource.setrlimit(resource.RLIMIT_AS, (int(case["limit"] * 1e9),) * 2)
    imports = resident_bytes()
    pipe = pipeline_of(case["width"], case["latents"], DTYPES[case["dtype"]])
    size = sum(value.nbytes for value in pipe.unet.state_dict().values())
    reset_peak()
    began = time.perf_counter()
    if case["what"] == "float":
        with torch.no_grad():
            run(pipe, [trajectory_seed(0, 0)], Sampling(case["steps"], prompts=(PROMPT,)))
    else:
        settings = {"samples": case["steps"], "trajectories": 1}
        stepquant.quantize(pipe, method=case["what"], scheme=case["scheme"], steps=case["steps"], prompts=[PROMPT],
                           settings=settings if case["what"] == "minmax" else {})  # fmt: skip
    seconds = time.perf_counter() - began
    return {"bytes": size, "peak": peak_bytes() - imports, "seconds": seconds}


def in_its_own_process(case: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:  # so that nothing is known from before
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--case", json.dumps(case)],
            stdout=subprocess.PIPE,
            env=os.environ | {"STEPQUANT_CACHE": cache},
            text=True,
            check=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=float, default=0.5, help="of the channels, as a share of the original's")
    add("--latents", default="32,64", help="of a side")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--method", default="minmax")
    add("--scheme", default="w8a8")
    add("--steps", type=int, default=2, help="of a single trajectory; minmax records every one of them")
    add("--limit", type=float, default=0, help="address space of each process in GB; 0: as much as there is")
    add("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    if options.case:
        print(json.dumps(measure(options.case)))
        return
    keys = ("width", "dtype", "scheme", "steps", "limit")
    shared = {key: getattr(options, key) for key in keys}
    print("| latents | float GB | | peak GB | over float | seconds |\n|---|---|---|---|---|---|")
    for latents in map(int, options.latents.split(",")):
        for what in ("float", options.method):
            found = in_its_own_process(shared | {"latents": latents, "what": what})
            size, peak = found["bytes"], found["peak"]
            row = (
                f"{latents}x{latents}",
                f"{size / 1e9:.2f}",
                what,
                f"{peak / 1e9:.2f}",
                f"{peak / size:.2f}",
            )
            print(f"| {' | '.join(row)} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main(read_options())
