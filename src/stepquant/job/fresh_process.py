"""What loading a model and making its first images costs a process that does nothing else.

`python -m stepquant.job.fresh_process` runs in that process and writes one line of JSON; `first_images` starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepquant.errors import EvaluationError
from stepquant.evaluate.speed.calls import settle
from stepquant.job.memory import peak_bytes
from stepquant.job.pipelines import load
from stepquant.models.call import Asked, Call
from stepquant.models.denoiser import Denoiser
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "as it is": None}


def first_images(
    models: Mapping[str, tuple[str, str]],
    batch: int,
    steps: int,
    threads: int,
    prompts: Sequence[Asked] = (),
) -> list[dict[str, Any]]:
    """For each name's (model, dtype): seconds to load and to the first images, and the peak of resident memory."""
    rows = []
    for name, (model, dtype) in models.items():
        words = {
            "model": model,
            "dtype": dtype,
            "batch": batch,
            "steps": steps,
            "threads": threads,
            "prompts": [one.packed() if isinstance(one, Call) else one for one in prompts],
        }
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "stepquant.job.fresh_process", json.dumps(words)],
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode != 0:
            raise EvaluationError(
                f"the process that measures {name} failed",
                where=model,
                got=(done.stderr.strip().splitlines() or ["nothing"])[-1][:300],
            )
        rows.append({"name": name, "batch": batch, "steps": steps} | json.loads(done.stdout.splitlines()[-1]))
    return rows


def measure(
    model: str, dtype: str, batch: int, steps: int, threads: int, prompts: Sequence[Any]
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    start_bytes, start = peak_bytes(), time.perf_counter()
    pipeline = load(Path(model) if Path(model).exists() else model)
    network, target = Denoiser.of(pipeline).model, DTYPES[dtype]
    if target is not None:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                settle(part, target, torch.channels_last if part is network else torch.contiguous_format)
    loaded = time.perf_counter()
    asked = tuple(Call.unpacked(one) if isinstance(one, dict) else one for one in prompts)
    run(pipeline, list(range(batch)), Sampling(steps, prompts=asked))
    return {
        "load_seconds": loaded - start,
        "first_image_seconds": time.perf_counter() - loaded,
        "start_bytes": start_bytes,
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))) + "\n")
