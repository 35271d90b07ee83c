"""Whole generations, the breakdown of a call, and the bars that are drawn of a benchmark."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from diffusers import DDIMPipeline, StableDiffusionPipeline

from stepquant.evaluate.speed import calls
from stepquant.evaluate.speed.breakdown import breakdown
from stepquant.evaluate.speed.calls import calling
from stepquant.evaluate.speed.generation import generation
from stepquant.evaluate.twins import Twins
from stepquant.models.hooks import first_arguments
from stepquant.models.sampling import Sampling
from stepquant.report.bars import write_bars
from stepquant.runtime import ops


@pytest.mark.parametrize("bf16", [True, False])
def test_generations_have_a_row_for_everyone(
    pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    monkeypatch.setattr(calls, "multiplies_bf16", lambda _: bf16)
    found = generation(Twins(pipeline, pipeline), Sampling(2, "ddim"), batches=(1, 2), seconds=0.0, count=1)
    names = ["fp32 eager", "bf16 eager", "stepquant"] if bf16 else ["fp32 eager", "stepquant"]
    assert [(row["batch"], row["name"]) for row in found["rows"]] == [(b, n) for b in (1, 2) for n in names]
    assert all(row["milliseconds"] > 0 for row in found["rows"])
    assert [row["ratio"] for row in found["rows"] if row["name"] == "fp32 eager"] == [1.0, 1.0]
    assert next(pipeline.unet.parameters()).dtype == torch.float32


def test_every_part_of_a_text_pipeline_is_in_the_type_of_its_row(
    text_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "multiplies_bf16", lambda _: True)
    sampling = Sampling(1, "ddim", ("a hat",))
    found = generation(Twins(text_pipeline, text_pipeline), sampling, batches=(1,), seconds=0.0, count=1)
    assert [row["name"] for row in found["rows"]] == ["fp32 eager", "bf16 eager", "stepquant"]
    assert {text_pipeline.text_encoder.dtype, text_pipeline.unet.dtype} == {torch.float32}


def test_a_breakdown_names_what_ran(pipeline: DDIMPipeline) -> None:
    found = breakdown(calling(pipeline.unet, first_arguments(pipeline, 1)))
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["aten::convolution"]["calls"] == sum(
        isinstance(module, torch.nn.Conv2d) for module in pipeline.unet.modules()
    )
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    assert found["ceilings"]["gigabytes_per_second"] > 0


@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
def test_integer_products_are_counted() -> None:
    product = ops.Product.of(torch.ones(48, 8, 3, 3, dtype=torch.int8), torch.ones(48), None)
    codes = torch.ones(1, 8, 6, 6, dtype=torch.uint8)
    row = breakdown(lambda: product.convolve(codes, ops.Code(1.0), torch.float32))["rows"][0]
    rate = row["tera_operations_per_second"] * 1e12 * row["milliseconds"] / 1000
    assert rate == pytest.approx(2 * 48 * 16 * 8 * 9)


def test_bars_are_as_high_as_the_ratios(tmp_path: Path) -> None:
    rows = [
        {"batch": batch, "name": kind, "ratio": ratio, "ratio_low": 0.9 * ratio, "ratio_high": 1.2 * ratio}
        for batch in (1, 8)
        for kind, ratio in (("fp32 <eager>", 1.0), ("stepquant", batch + 2.0))
    ]
    rows.append(rows[0] | {"name": "absent", "ratio": None})
    write_bars({"rows": rows, "reference": 'fp32 "eager"', "threads": 2}, tmp_path / "bars.svg")
    assert [file.name for file in tmp_path.iterdir()] == ["bars.svg"]
    drawn = ElementTree.parse(tmp_path / "bars.svg").getroot()
    (_, *bars, _, _) = [x for x in drawn if x.tag.endswith("rect")]  # the paper, and two marks of the legend
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 3, 1, 10], rel=0.01)
    assert len({bar.attrib["y"] for bar in bars if bar.attrib.get("class") == "ours"}) == 2
    ends = [float(x.attrib["y1"]) - float(x.attrib["y2"]) for x in drawn if x.get("class") == "whisker"]
    assert [end / heights[0] for end in ends] == pytest.approx([0.3, 0.9, 0.3, 3], rel=0.02)
    words = [text.text for text in drawn if text.tag.endswith("text")]
    assert {"fp32 <eager>", "stepquant", "batch 8", "10.0", 'times faster than fp32 "eager"'} <= set(words)
    assert "absent" not in words


def test_a_benchmark_of_nobody_is_a_chart_without_bars(tmp_path: Path) -> None:
    write_bars({"rows": [], "reference": "fp32 eager", "threads": 2}, tmp_path / "bars.svg")
    drawn = ElementTree.parse(tmp_path / "bars.svg").getroot()
    assert len([x for x in drawn if x.tag.endswith("rect")]) == 1
