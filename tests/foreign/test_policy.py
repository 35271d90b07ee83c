"""Precision by step beside integers of other programs: asked for, or as their configurations carry it."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, HeunDiscreteScheduler, UNet2DModel

import stepquant
from stepquant import hub
from stepquant.calib.times import times_of
from stepquant.cli.app import main
from stepquant.core.policy import FloatSteps, StepPolicy
from stepquant.errors import ArtifactError, StepquantError
from stepquant.job.foreign import convert
from stepquant.models.sampling import Sampling
from tests.core.test_policy import SHIPPED
from tests.foreign.sdnq_writer import folder_of, packed
from tests.foreign.test_convert import rotated, written
from tests.runtime.synthetic import noise, relative

SAID = SHIPPED | {"scope": ["unet"], "first_steps": {"count": 1, "mode": "a16"}}
TIMES = torch.tensor([800, 600, 400, 200, 0])  # of five steps of DDIM


@pytest.fixture
def folder(pipeline: DDIMPipeline, tmp_path: Path) -> Path:
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def sdnq(pipeline: DDIMPipeline, folder: Path, policy: Any, products: bool = True) -> Path:
    """The pipeline's network as SDNQ packs it, in the place of the float one."""
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    config = {"weights_dtype": "int8", "use_quantized_matmul": products}
    kind = partial(packed, "int8", transposed=products)
    runtime = {"diffusion_step_policy": policy}
    return folder_of(pipeline.unet, kind, **config, runtime=runtime).write(folder / "unet")


def check_steps(model: Any, first: int, last: int) -> None:
    """Against the same integers whose layers were made float for good, at every step."""
    x, floats = noise(2, 3, 8, 8), copy.deepcopy(model)
    floats.dequantize()
    for step, t in enumerate(TIMES.tolist()):
        with torch.no_grad():
            apart = relative(model(x, t).sample, floats(x, t).sample)
        at_an_end = step < first or step >= len(TIMES) - last
        assert (apart < 1e-5) == at_an_end, (step, apart)


def test_times_are_those_that_the_sampler_makes(pipeline: DDIMPipeline) -> None:
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(times_of(pipeline, Sampling(5)), TIMES)
    own = pipeline.unet.forward
    assert own == type(pipeline.unet).forward.__get__(pipeline.unet)
    pipeline.scheduler = HeunDiscreteScheduler()
    heun = times_of(pipeline, Sampling(4))
    assert len(heun) == 7  # of second order: all but the last are asked twice
    assert torch.equal(heun[1::2], heun[2::2])


def test_a_policy_that_is_asked_for(pipeline: DDIMPipeline, folder: Path, tmp_path: Path) -> None:
    source = written(pipeline.unet, None, rotated)[0].write(tmp_path / "some.safetensors")
    made = stepquant.load(source, config=folder, policy="first=1,last=2", steps=5)
    check_steps(made.unet, 1, 2)
    out = tmp_path / "out"
    asked = ["--config", str(folder), "--policy", "first=1,last=2", "--steps", "5", "--out", str(out)]
    assert main(["convert", str(source), *asked]) == 0
    loaded = UNet2DModel.from_pretrained(out)
    assert hub.config_of(loaded).to_dict() == hub.config_of(made.unet).to_dict()
    assert hub.config_of(loaded).artifact.policy == FloatSteps.of(StepPolicy(1, 2), "unet", TIMES)
    check_steps(loaded, 1, 2)
    with pytest.raises(StepquantError, match="counts the steps of a sampler"):
        convert(source, tmp_path / "other", config=folder / "unet", policy="last=1")


def test_a_folder_that_carries_a_policy(
    pipeline: DDIMPipeline, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = sdnq(pipeline, folder, SAID)
    assert main(["inspect", str(network)]) == 0
    assert "activations in float at the first step and the last 2 steps" in capsys.readouterr().out
    made = stepquant.load(folder, steps=5)
    assert hub.config_of(made.unet).recipe["program"] == "SDNQ"
    check_steps(made.unet, 1, 2)
    convert(network, tmp_path / "out", config=folder, steps=5)
    check_steps(UNet2DModel.from_pretrained(tmp_path / "out"), 1, 2)
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "activations in float at the first step and the last 2 steps" in capsys.readouterr().out
    with pytest.raises(StepquantError, match="counts the steps of a sampler"):
        convert(network, tmp_path / "other")


def test_a_policy_of_another_version_or_part_is_refused(pipeline: DDIMPipeline, folder: Path) -> None:
    network = sdnq(pipeline, folder, SAID)
    for entry, value in (("schema_version", 2), ("scope", ["transformer"])):
        told = json.loads((network / "config.json").read_text())
        told["quantization_config"]["runtime"]["diffusion_step_policy"] = SAID | {entry: value}
        (network / "config.json").write_text(json.dumps(told))
        with pytest.raises(ArtifactError, match=f"{entry}|another component"):
            stepquant.load(folder)


def test_where_no_input_is_quantized_a_policy_changes_nothing(
    pipeline: DDIMPipeline, folder: Path, tmp_path: Path
) -> None:
    network = sdnq(pipeline, folder, SAID, products=False)
    made = stepquant.load(folder)
    assert hub.config_of(made.unet).artifact.policy is None
    with pytest.raises(StepquantError, match="would change nothing"):
        convert(network, tmp_path / "out", config=folder, policy="last=1")
