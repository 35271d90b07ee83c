"""What serving imports: a fresh process that loads an artifact and calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stepquant import hub
from stepquant.calib.record import Source
from stepquant.quant.schemes import scheme
from tests.runtime.synthetic import noise, quantized

# Of the package, folders and the compiled module included; a change that needs more says here why.
# Families of networks and the blocks that are fused are declared in one file a kind, transformers has a bridge of its own,
# six are about adapters and the way back, one more where peft is installed, one is the maths of rotation, one is what
# recorded calls keep, one tells what is offloaded, three are about steps in float, one about samples at different steps, two
# about the attention of text encoders, three about the queries, keys and norms of transformers, and three about tables of
# embeddings and what a network says of itself when all its numbers are packed.
MOST_MODULES = 121
QUANTIZES = ("calib", "cli", "evaluate", "fit", "job", "methods", "quant", "report")

LOAD = """
import sys, torch, stepquant
from diffusers import DiffusionPipeline
before = [name for name in sys.modules if name.partition(".")[0] == "stepquant"]
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
with torch.no_grad():
    pipe.unet(torch.zeros(1, 3, 8, 8), 5)
after = [name for name in sys.modules if name.partition(".")[0] == "stepquant"]
print(len(before), *after)
"""


def test_a_load_imports_little_and_nothing_that_quantizes(source: Source, tmp_path: Path) -> None:
    pipe = source.pipeline
    artifact, _ = quantized(pipe.unet, scheme("w8a8"), lambda t: pipe.unet(noise(1, 3, 8, 8), t).sample)
    hub.attach(pipe.unet, artifact)
    pipe.save_pretrained(tmp_path / "out")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    _, *loaded = run.stdout.splitlines()[-1].split()
    assert "stepquant.runtime.lower" in loaded
    assert not [name for name in loaded if name.split(".")[1:2] and name.split(".")[1] in QUANTIZES]
    assert len(loaded) <= MOST_MODULES, "\n".join(sorted(loaded))
