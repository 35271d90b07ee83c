"""Two artifacts side by side: what is said to differ is what differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from stepquant.core.grid import Grid
from stepquant.errors import StepquantError
from stepquant.job.compare import Evaluation, Inline, Variant, compare, grid
from stepquant.job.diff import Side, diff, draw, quality_rows


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in a run store, by method and scheme."""
    evaluation = Evaluation.of(images=4, steps=2, batch=2, speed=0, probed=2, shown=2)
    variants = [Variant("minmax"), Variant("ptq4dm")]
    store = tmp_path_factory.mktemp("diff")
    cells = grid(str(tiny), variants, ["w8a8", "w4a8"], [0], evaluation, settings={"samples": 8}, steps=4)
    compare(cells, store, executor=Inline())
    return {folder.name.split("-s0")[0]: folder for folder in store.glob("artifacts/*")}


def test_an_artifact_does_not_differ_from_itself(made: dict[str, Path]) -> None:
    found = diff(made["minmax-w8a8"], made["minmax-w8a8"] / "artifact")
    assert found["recipe"] == found["layers"] == found["products"] == []
    assert found["unchanged"] == found["a"]["layers"] > 10
    assert found["images"]["psnr"] == 100


def test_grids_sizes_and_recipe(made: dict[str, Path]) -> None:
    found = diff(made["minmax-w8a8"], made["minmax-w4a8"])
    assert {row["key"] for row in found["recipe"]} == {"scheme"}
    assert found["b"]["bytes"] < found["a"]["bytes"]
    changed = {row["path"]: row for row in found["layers"]}
    row = changed["mid_block.resnets.0.conv1"]
    assert row["weight"] == ["int8/channel", "int4/channel"]
    assert row["input"] == ["uint8/tensor", "uint8/tensor"]
    assert row["changed"] is None
    assert row["weight_scale"] == pytest.approx(255 / 15 - 1, rel=0.1)
    assert len(changed) + found["unchanged"] == found["a"]["layers"]


def test_integers_are_counted_one_by_one(made: dict[str, Path]) -> None:
    found = diff(made["minmax-w4a8"], made["ptq4dm-w4a8"])
    sides = [Side.read(made[name]) for name in ("minmax-w4a8", "ptq4dm-w4a8")]
    rows = [row for row in found["layers"] if row["changed"]]
    assert rows
    for row in rows:
        weights = [layer_integers(side, row["path"]) for side in sides]
        change = (weights[0] - weights[1]).abs()
        assert row["changed"] == pytest.approx(float((change > 0.5).double().mean()))
        assert row["largest"] == round(float(change.max()))


def layer_integers(side: Side, path: str) -> torch.Tensor:
    """From the nibbles of the packed bytes, one by one."""
    form = Grid.parse(side.config.layers[path]["weight"])
    data = side.tensors[f"{path}.weight"]
    if form.bits == 8:
        return data.double() + form.qmin
    assert form.bits == 4
    return torch.stack([data % 16, data // 16], 1).reshape(-1).double() + form.qmin


def test_what_was_measured(made: dict[str, Path], tmp_path: Path) -> None:
    found = diff(made["minmax-w8a8"], made["minmax-w4a8"])
    ratio = next(row for row in found["quality"] if row["name"] == "PSNR")
    assert ratio["a"] > ratio["b"] > ratio["floor"]
    assert len(found["images"]["seeds"]) == 2
    draw(made["minmax-w8a8"], made["minmax-w4a8"], tmp_path / "three.png")
    with Image.open(tmp_path / "three.png") as image:
        assert image.height > image.width  # three rows of two


def test_numbers_of_different_networks_are_not_laid_side_by_side() -> None:
    number = {"name": "FID", "against": "data", "value": 1.0, "n": 9, "resize": "", "extractor": "one"}
    a, b = ({"quality": [number | {"extractor": name}]} for name in ("one", "two"))
    assert [row["floor"] for row in quality_rows(a, a)] == [None]
    assert quality_rows(a, b) == []


def test_without_images(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(made["minmax-w8a8"] / "artifact", tmp_path / name)
    assert diff(tmp_path / "a", tmp_path / "b")["images"] is None
    with pytest.raises(StepquantError, match="no images of the same seeds"):
        draw(tmp_path / "a", tmp_path / "b", tmp_path / "three.png")


def test_a_float_model_is_no_artifact(made: dict[str, Path], tiny: Path) -> None:
    with pytest.raises(StepquantError, match="holds a float model"):
        diff(made["minmax-w8a8"], tiny)
