from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline

from stepquant.calib.pick import one_each
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search
from stepquant.errors import EvaluationError, StepquantError
from stepquant.evaluate.study import sensitivity as module
from stepquant.evaluate.study.sensitivity import Study, sensitivity
from stepquant.fit.lines import Lines
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.plan import Plan, Rule

W8, A8 = Grid(8, granularity="channel"), Grid(8, signed=False, symmetric=False)
FEW = Plan(
    "few",
    (
        Rule(W8, "ends", path="conv_*", ports=("weight",)),
        Rule(W8, "middle", path="mid_block*", ports=("weight",)),
        Rule(A8, "middle", path="mid_block*", ports=("input",)),
        Rule(Grid(8), "middle", path="mid_block*", roles=("product",), ports=("query", "key", "value")),
        Rule(Grid(8, signed=False), "middle", path="mid_block*", ports=("probabilities",)),
        Rule(None, "the rest stays float"),
    ),
)
SMALL = Study(bits=(3, 8), samples=4, steps=4, images=2, image_steps=2)


def by_site(found: dict[str, Any], metric: str = "noise") -> dict[tuple[str, int], float]:
    return {
        (f"{row['path']}:{row['port']}", row["bits"]): row["value"]
        for row in found["rows"]
        if row["metric"] == metric
    }


@pytest.fixture
def found(pipeline: DDIMPipeline, tmp_path: Path) -> dict[str, Any]:
    return sensitivity(pipeline, FEW, SMALL, cache=tmp_path)


def test_every_quantized_site_has_a_row_and_fewer_bits_hurt_more(
    pipeline: DDIMPipeline, found: dict[str, Any]
) -> None:
    decided = FEW.resolve(Denoiser.of(pipeline)).values()
    values = by_site(found)
    assert {key for key, _ in values} == {f"{x.path}:{x.port}" for x in decided if x.grid is not None}
    assert all(values[key, 3] > values[key, 8] > 0 for key, _ in values)
    assert {row["role"] for row in found["rows"]} == {
        "stem",
        "head",
        "conv",
        "modulate",
        "product",
        "q",
        "k",
        "v",
        "attn_out",
    }
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found, allow_nan=False))


def test_one_weight_alone_is_what_was_changed(
    pipeline: DDIMPipeline, found: dict[str, Any], tmp_path: Path
) -> None:
    """Against the model with that weight replaced by hand."""
    source = Source(pipeline, Sampling(4), cache=tmp_path)
    data = source.record(one_each(torch.linspace(0, 3, 4).round().long()))
    batch = next(iter(data.batches(4)))
    layer, grid = pipeline.unet.conv_out, Grid(3, granularity="channel")
    with torch.no_grad():
        target = pipeline.unet(**batch.arguments).sample
        rows = layer.weight.flatten(1)
        scale, zero = scale_and_zero(*lp_search(rows, grid), grid)
        layer.weight.copy_(
            fake_quantize(rows, scale[:, None], zero[:, None], grid).reshape(layer.weight.shape)
        )
        error = pipeline.unet(**batch.arguments).sample - target
    relative = error.flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
    expected = float(relative.square().mean().sqrt())
    assert by_site(found)["conv_out:weight", 3] == pytest.approx(expected, rel=1e-4)


def test_the_model_is_float_again_afterwards(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    before = Denoiser.of(pipeline).digest()
    sensitivity(pipeline, FEW, Study((4,), samples=2, steps=2), cache=tmp_path)
    assert Denoiser.of(pipeline).digest() == before


def test_images_are_measured_where_asked(pipeline: DDIMPipeline, tmp_path: Path) -> None:
    study = Study((2,), ("noise", "psnr"), samples=2, steps=2, images=2, image_steps=2)
    found = sensitivity(pipeline, FEW, study, cache=tmp_path)
    likeness = by_site(found, "psnr")
    assert 5 < likeness["conv_in:weight", 2] < 100
    with pytest.raises(EvaluationError, match="11 pixels"):
        sensitivity(pipeline, FEW, Study((2,), ("ssim",), 2, 2, 2, 2), cache=tmp_path)
    with pytest.raises(EvaluationError, match="32x32"):
        sensitivity(pipeline, FEW, Study((2,), ("features",), 2, 2, 2, 2), cache=tmp_path)


def test_models_that_take_text_are_studied_with_prompts(
    text_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    study = Study((2,), ("noise", "ssim"), samples=2, steps=2, images=1, image_steps=1)
    found = sensitivity(text_pipeline, FEW, study, prompts=["a b", "c"], cache=tmp_path)
    roles = {row["role"] for row in found["rows"]}
    assert roles >= {"ff_in", "k_text", "product"}


def test_a_killed_run_goes_on_where_it_was(
    pipeline: DDIMPipeline, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (journal,) = (tmp_path / "sensitivity").glob("*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])  # three are missing, one of them torn
    measured: list[int] = []
    call = module.Meter.__call__
    monkeypatch.setattr(module.Meter, "__call__", lambda self: measured.append(1) or call(self))
    again = sensitivity(pipeline, FEW, SMALL, cache=tmp_path)
    assert len(measured) == 3
    assert again == found
    wider = Study(bits=(3, 4, 8), samples=4, steps=4, images=2, image_steps=2)
    measured.clear()
    sensitivity(pipeline, FEW, wider, cache=tmp_path)
    assert len(measured) == len(found["sites"])  # only those of four bits are new


def test_the_journal_survives_torn_and_foreign_lines(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "deep" / "journal.jsonl")
    assert lines.read() == {}
    lines.append("a", {"x": 1})
    with lines.file.open("ab") as stream:
        stream.write(b'{"key": "b", "val')
    assert set(lines.read()) == {"a"}
    lines.append("c", {"x": 3})
    with lines.file.open("ab") as stream:
        stream.write(b"\xff\x00 nonsense\n[1]\n")
    lines.append("d", {"x": 4})
    assert {key: value["x"] for key, value in lines.read().items()} == {"a": 1, "c": 3, "d": 4}


@pytest.mark.parametrize("study", [Study((4, 9)), Study(()), Study((4,), ("noize",))])
def test_impossible_studies_are_named(pipeline: DDIMPipeline, study: Study, tmp_path: Path) -> None:
    with pytest.raises(StepquantError):
        sensitivity(pipeline, FEW, study, cache=tmp_path)
