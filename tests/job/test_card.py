"""The model card: from the artifact alone, the same whenever it is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import stepquant as sq
from stepquant.errors import ArtifactError
from stepquant.evaluate.twins import Twins
from stepquant.job import Recipe, load, quantize_to
from stepquant.job.card import shown_with, write_card
from stepquant.job.results import describe_alone, describe_artifact, keep_results
from stepquant.models.sampling import Sampling

QUICK = {"samples": 8, "batch": 4}


@pytest.fixture
def artifact(tiny: Path, tmp_path: Path) -> Path:
    recipe = Recipe.of(model=str(tiny), method="minmax", settings=QUICK, steps=4)
    return quantize_to(recipe, tmp_path / "tiny-w8a8").out


def test_the_float_model_is_not_needed(artifact: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / artifact.name
    shutil.copytree(artifact, alone)
    cards = [write_card(place).read_text() for place in (artifact, alone)]
    assert cards[0] == cards[1]
    assert "# tiny-w8a8\n" in cards[0]
    assert "tiny (UNet2DModel, 0.2 million parameters)" in cards[0]
    assert "![Samples](samples.png)" in cards[0]
    assert (artifact / "samples.png").read_bytes() == (alone / "samples.png").read_bytes()
    assert str(tmp_path) not in cards[0]
    assert not list(artifact.glob(".*"))


def test_the_artifact_knows_what_the_float_model_would_say(tiny: Path, artifact: Path) -> None:
    quantized = load(artifact)
    beside = describe_artifact(Twins(load(tiny), quantized), artifact, artifact.name)
    assert describe_alone(quantized, artifact) == beside


def test_what_was_measured_is_in_it(artifact: Path) -> None:
    known = describe_alone(load(artifact), artifact)
    number = {"name": "PSNR", "against": "float", "value": 37.5, "n": 2, "better": "higher", "unit": "dB"}
    keep_results(artifact, known | {"quality": [number]})
    assert "37.5" in write_card(artifact).read_text()
    keep_results(
        artifact, known | {"quality": [number], "quantized": known["quantized"] | {"digest": "other"}}
    )
    assert "37.5" not in write_card(artifact).read_text()


@pytest.mark.parametrize(
    ("tables", "steps", "shown"), [(None, 60, 50), (None, 20, 20), ({"times": 60}, 60, 60)]
)
def test_an_artifact_with_tables_by_step_is_shown_in_its_own_steps(
    tables: dict[str, Any] | None, steps: int, shown: int
) -> None:
    config: Any = SimpleNamespace(steps=tables, recipe={"steps": steps, "sampler": "ddim", "prompts": None})
    assert shown_with(config) == Sampling(shown, "ddim")
    config.recipe["sampler"] = "DDIMScheduler"  # the pipeline's own, by its class
    assert shown_with(config).sampler is None


def test_a_float_model_gets_none(tiny: Path) -> None:
    with pytest.raises(ArtifactError, match="holds a float model"):
        write_card(tiny)
    assert not (tiny / "README.md").exists()


def test_the_package_offers_it(artifact: Path) -> None:
    assert sq.write_card is write_card
    assert "write_card" in json.loads(json.dumps(sq.__all__))
