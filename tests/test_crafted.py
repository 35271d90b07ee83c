"""What is in a folder is not believed: everything that cannot be is one error that names it."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import Tensor

from stepquant import hub
from stepquant.artifact import UNCOVERED
from stepquant.calib.record import Source
from stepquant.core.grid import Grid, GridError
from stepquant.errors import ArtifactError, ModelError, StepquantError
from stepquant.job.pipelines import load
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
from tests import crafted
from tests.conftest import make_unet

JUNK: tuple[Any, ...] = (None, True, -1, 1.5, "x", "", [], [1], [[]], {}, {"x": 1}, {"": {"": None}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One artifact as most are, and one with a table of the time embedding and ranges for each step."""
    out = {}
    for name in ("plain", "stepped"):
        place = tmp_path_factory.mktemp(name)
        pipe = DDIMPipeline(make_unet(), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        source = Source(pipe, Sampling(4), batch=4, cache=place / "calibration")
        out[name] = crafted.save(source, place / "out", steps=name == "stepped")
    return out


@pytest.fixture
def folder(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["plain"].parent, tmp_path / "out")) / "unet"


@pytest.fixture
def stepped(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["stepped"].parent, tmp_path / "out")) / "unet"


def filled(value: float, at: int = 0) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[at] = value
        return tensor

    return change


BAD_VALUES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("conv_in.weight_scale", filled(torch.nan), "numbers above 0"),
    ("conv_in.weight_scale", filled(-1.0), "numbers above 0"),
    ("conv_out.input_scale", filled(torch.inf), "numbers above 0"),
    ("conv_out.input_scale", filled(0.0), "numbers above 0"),
    ("conv_out.input_scale", filled(1e-40), "numbers above 0"),
    ("conv_out.input_zero_point", filled(256), "from 0 to 255"),
    ("conv_out.input_zero_point", filled(-1), "from 0 to 255"),
    ("mid_block.attentions.0.product.query_zero_point", filled(1), "from 0 to 0"),
    ("conv_in.bias", filled(torch.nan), "finite numbers"),
    ("conv_norm_out.weight", filled(torch.inf), "finite numbers"),
    ("conv_in.weight", lambda t: t.to(torch.int8), "torch.uint8"),
    ("conv_in.weight_scale", lambda t: t.half(), "torch.float32"),
    ("conv_in.weight_scale", lambda t: t.double(), "torch.float32"),
    ("conv_out.input_zero_point", lambda t: t.float(), "torch.int32"),
    ("conv_norm_out.weight", lambda t: t.int(), "torch.float32"),
    ("conv_in.weight", lambda t: t[:-1], "("),
]


@pytest.mark.parametrize("name, change, expected", BAD_VALUES)
def test_values_that_cannot_be_are_named(
    folder: Path, name: str, change: Callable[[Tensor], Tensor], expected: str
) -> None:
    config, tensors = crafted.read(folder)
    tensors[name] = change(tensors[name])
    crafted.agree(config, tensors)
    crafted.write(folder, config, tensors)
    with pytest.raises(ArtifactError, match=f"'{name}'") as caught:
        UNet2DModel.from_pretrained(folder)
    error = caught.value
    assert error.where is not None
    assert error.where.endswith(crafted.WEIGHTS)
    assert error.got is not None
    assert error.fix
    assert expected in str(error.expected)


@pytest.mark.parametrize(
    "name, change",
    [
        ("steps.rows", filled(99)),
        ("steps.rows", filled(-1)),
        ("steps.table", filled(torch.nan)),
        ("steps.correction_bias", filled(torch.inf)),
        ("steps.correction_variance", filled(-1.0)),
        ("steps.bits", filled(-1)),  # the bits of NaN
        ("steps.bits", lambda t: t[:1].expand(len(t))),
    ],
)
def test_tables_of_steps_are_checked(stepped: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    config, tensors = crafted.read(stepped)
    tensors[name] = change(tensors[name])
    crafted.agree(config, tensors)
    crafted.write(stepped, config, tensors)
    with pytest.raises(ArtifactError, match=f"'{name}'"):
        UNet2DModel.from_pretrained(stepped)


@pytest.mark.parametrize("key, value", [("table", 5), ("channels", 7), ("groups", 10**12), ("times", 3)])
def test_sizes_of_steps_fit_the_model(stepped: Path, key: str, value: int) -> None:
    config, _ = crafted.read(stepped)
    config["quantization_config"]["steps"][key] = value
    crafted.agree(config)
    crafted.write(stepped, config)
    with pytest.raises(ArtifactError):
        UNet2DModel.from_pretrained(stepped)


def test_a_loaded_state_dict_is_checked(folder: Path) -> None:
    model = UNet2DModel.from_pretrained(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv_out.input_scale"].fill_(torch.nan)
    with pytest.raises(ArtifactError, match="conv_out.input_scale"):
        model.load_state_dict(state)


def configurations(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry of `quantization_config`, and one of those within each, missing or something else."""

    def changed(*path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for value in (*JUNK, ...):
            other = copy.deepcopy(config)
            place = other["quantization_config"]
            for key in path[:-1]:
                place = place[key]
            former = place.pop(path[-1], None)
            if value is not ...:
                place[path[-1]] = value
            if value != former:
                yield f"{'.'.join(path)}={value!r}", other

    told = config["quantization_config"]
    attention = next(iter(told["products"]))
    for key in told:
        yield from changed(key)
    for key in ("conv_in", "no.such.layer", ""):
        yield from changed("layers", key)
    for key in ("weight", "input", "extra"):
        yield from changed("layers", "conv_in", key)
    for key in (attention, "conv_in", "no.such"):
        yield from changed("products", key)
    for key in ("query", "probabilities", "shifted", "extra"):
        yield from changed("products", attention, key)
    for key in ("conv_in", "mid_block", "no.such"):
        yield from changed("splits", key)
    for grid in (
        "int-8/channel",
        "int99/tensor",
        f"int{'9' * 5000}/tensor",
        "int8/group5",
        "int8/step",
        "int8/token",
    ):
        other = copy.deepcopy(config)
        other["quantization_config"]["layers"]["conv_in"]["weight"] = grid
        yield f"grid {grid[:20]}", other
    for steps in ({"times": 2}, {"times": -1}, {"times": 2, "noise": "much"}, {"times": [2]}, {"x": 1}):
        other = copy.deepcopy(config)
        other["quantization_config"]["steps"] = steps
        yield f"steps {steps}", other


def read_again(config: dict[str, Any], format: int) -> dict[str, Any]:
    """The same with digests that agree, as far as there is anything for them to agree with."""
    other = copy.deepcopy(config)
    told = other["quantization_config"]
    if told.get("format") == config["quantization_config"].get("format") == 2:
        try:
            crafted.agree(other, format=format)
        except (TypeError, KeyError, AttributeError):
            return config
    return other


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.filterwarnings("ignore:this artifact is of format 1")
def test_no_configuration_ends_in_anything_but_one_error(folder: Path, format: int) -> None:
    original, _ = crafted.read(folder)
    refused, wrong = 0, []
    for name, config in configurations(original):
        config = read_again(config, format)
        try:
            hub.StepquantConfig.from_dict(config["quantization_config"])
            crafted.write(folder, config)
            UNet2DModel.from_pretrained(folder)
        except StepquantError as error:
            refused += 1
            wrong += [] if error.fix else [f"{name}: says not what to do"]
        except Exception as error:
            wrong.append(f"{name}: {error!r}")
    assert not wrong, "\n".join(wrong)
    assert refused > 200


@pytest.mark.parametrize(
    "value", [[], "stepquant", 5, {"quant_method": "stepquant"}, {"quant_method": ["stepquant"]}]
)
def test_what_diffusers_stumbles_over_is_one_error(folder: Path, value: Any) -> None:
    config, _ = crafted.read(folder)
    crafted.write(folder, config | {"quantization_config": value})
    with pytest.raises(StepquantError):
        load(folder.parent)


EDITS: list[dict[str, Any]] = [
    {"norm_num_groups": 4},
    {"flip_sin_to_cos": False},
    {"norm_eps": 0.1},
    {"_use_default_values": ["norm_num_groups"]},
    {"layers_per_block": 10**9},
    {"block_out_channels": "many"},
    {"unheard_of": 1},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: next(iter(edit)))
def test_an_edited_model_is_refused(folder: Path, edit: dict[str, Any]) -> None:
    config, _ = crafted.read(folder)
    crafted.write(folder, config | edit)
    with pytest.raises(ArtifactError, match="config.json was edited") as caught:
        load(folder.parent)
    assert caught.value.where == str(folder / "config.json")


@pytest.mark.parametrize("edit", [{"norm_num_groups": 4}, {"flip_sin_to_cos": False}, {"act_fn": ...}])
def test_diffusers_alone_notices_too(folder: Path, edit: dict[str, Any]) -> None:
    config, _ = crafted.read(folder)
    crafted.write(folder, {key: value for key, value in (config | edit).items() if value is not ...})
    with pytest.raises(ArtifactError, match="config.json was edited"):
        UNet2DModel.from_pretrained(folder)


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def test_an_edited_grid_is_refused(folder: Path) -> None:
    config, _ = crafted.read(folder)
    config["quantization_config"]["layers"]["conv_in"]["weight"] = "int8/channel/asym"
    crafted.write(folder, config)
    with pytest.raises(ArtifactError, match="config.json was edited"):
        UNet2DModel.from_pretrained(folder)


def test_what_diffusers_adds_is_no_edit(folder: Path, tmp_path: Path) -> None:
    config, _ = crafted.read(folder)
    added = {"_name_or_path": "elsewhere", "_diffusers_version": "99.0", "torch_dtype": "float16", "_new": 1}
    crafted.write(folder, config | added)
    model = UNet2DModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again, _ = crafted.read(tmp_path / "again")
    assert again["quantization_config"] == config["quantization_config"]
    UNet2DModel.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "third")
    UNet2DModel.from_pretrained(tmp_path / "third")


def test_a_setting_that_a_newer_diffusers_knows_is_no_edit(folder: Path, tmp_path: Path) -> None:
    """As if `act_fn` had been invented after the artifact was saved: its default is what the model did before."""
    config, tensors = crafted.read(folder)
    older = without(config, "act_fn")
    crafted.agree(older, tensors)
    crafted.write(folder, older, tensors)
    UNet2DModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again, _ = crafted.read(tmp_path / "again")
    assert again["act_fn"] == config["act_fn"]
    UNet2DModel.from_pretrained(tmp_path / "again")


def test_the_former_format_loads_and_says_so_once(folder: Path, tmp_path: Path) -> None:
    before = run(DiffusionPipeline.from_pretrained(folder.parent), [1], Sampling(2))
    config, tensors = crafted.read(folder)
    crafted.agree(config, tensors, format=UNCOVERED)
    crafted.write(folder, config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        pipes = [load(folder.parent) for _ in range(2)]
    assert [str(one.message)[:28] for one in said if "format 1" in str(one.message)] == [
        "this artifact is of format 1"
    ]
    assert torch.equal(run(pipes[0], [1], Sampling(2)), before)
    pipes[0].save_pretrained(tmp_path / "again")
    again, _ = crafted.read(tmp_path / "again" / folder.name)
    assert again["quantization_config"] == json.loads(json.dumps(config["quantization_config"]))


def test_a_shard_that_holds_other_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    """The index of a sharded folder says what is where; the files may say otherwise."""
    UNet2DModel.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    first = sorted((tmp_path / "parts").glob("*.safetensors"))[0]
    UNet2DModel.from_pretrained(tmp_path / "parts")
    original = crafted.load_file(first)
    some = next(iter(original))
    for other, message in (
        (original | {"extra": torch.zeros(1)}, "'extra' is foreign"),
        ({name: value for name, value in original.items() if name != some}, "is missing"),
    ):
        crafted.save_file(other, first, {"format": "pt"})
        with pytest.raises(ArtifactError, match=message):
            UNet2DModel.from_pretrained(tmp_path / "parts")


def test_a_grid_error_is_one_of_ours() -> None:
    with pytest.raises(StepquantError) as caught:
        Grid.parse("int1/tensor")
    assert isinstance(caught.value, GridError)
    assert "uint8/tensor" in str(caught.value.expected)


def test_a_float_folder_that_is_broken_is_no_artifact(pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "unet" / "config.json").read_text())
    (tmp_path / "float" / "unet" / "config.json").write_text(json.dumps(config | {"norm_num_groups": 0}))
    with pytest.raises(ModelError, match="cannot load this pipeline"):
        load(tmp_path / "float")
