"""Networks beside the denoiser: quantized by the same command, saved in their own folders, loaded by diffusers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

import stepquant as sq
from stepquant import hub
from stepquant.errors import ArtifactError, ModelError, RuntimeSupportError, StepquantError
from stepquant.fit.extremes import fit_extremes
from stepquant.job.parts import plan_for_parts
from stepquant.job.results import describe_alone
from stepquant.models.generate import run
from stepquant.models.part import NOT_CALLED, Part, Received, seen_by
from stepquant.models.sampling import Sampling
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.coverage import traced
from stepquant.runtime.layers.embedding import IntegerEmbedding

ALL = ("unet", "text_encoder", "vae")
SAMPLED = Sampling(2, prompts=("a character",))
IMAGES = """
import sys, stepquant
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from stepquant.models.generate import run
from stepquant.models.sampling import Sampling
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
save_file({"images": run(pipe, [1], Sampling(2, prompts=("a character",)))}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    pipe = sq.load("stepquant:characters-text")
    fast = {"samples": 4, "trajectories": 2, "batch": 4}
    cache = pytest.MonkeyPatch()
    cache.setenv("STEPQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
    sq.quantize(pipe, method="minmax", settings=fast, steps=2, prompts=["a character"], components=ALL)
    cache.undo()
    return pipe


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    place = tmp_path_factory.mktemp("parts") / "out"
    pipeline.save_pretrained(place)
    return place


def test_all_parts_load_in_a_fresh_process_and_make_the_same_image(pipeline, folder: Path) -> None:  # type: ignore[no-untyped-def]
    before = run(pipeline, [1], SAMPLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = folder.parent / "images.safetensors"
    subprocess.run([sys.executable, "-c", IMAGES, str(folder), str(out)], env=environment, check=True)
    assert torch.equal(load_file(out)["images"], before)
    float_image = run(sq.load("stepquant:characters-text"), [1], SAMPLED)
    assert 0 < (float_image - before).abs().mean() < 0.1
    for name, kind in (("text_encoder", CLIPTextModel), ("vae", AutoencoderKL)):
        assert hub.config_of(kind.from_pretrained(folder / name)) is not None


def test_parts_run_in_integers_and_are_told(pipeline, folder: Path) -> None:  # type: ignore[no-untyped-def]
    known = describe_alone(pipeline, folder)
    rows = {part["name"]: part for part in known["parts"]}
    assert set(rows) == {"text_encoder", "vae"}
    decoder = [row for row in rows["vae"]["coverage"] if row["path"].startswith("decoder.")]
    integer = sum(row["macs"] for row in decoder if row["integer"])
    assert integer > 0.97 * sum(row["macs"] for row in decoder)
    idle = next(row for row in rows["vae"]["coverage"] if row["path"] == "encoder.conv_in")
    assert (idle["integer"], idle["weight"], idle["input"]) == (False, "int8/channel", "float")
    assert NOT_CALLED in [rule["reason"] for rule in hub.config_of(pipeline.vae).recipe["plan"]]
    assert rows["vae"]["size"]["ratio"] < 0.35
    layers = [row for row in rows["text_encoder"]["coverage"] if row["role"] == "layer" and row["macs"]]
    assert layers
    assert all(row["integer"] for row in layers)
    products = [row for row in rows["text_encoder"]["coverage"] if row["role"] == "product"]
    assert len(products) == pipeline.text_encoder.config.num_hidden_layers
    assert all(row["integer"] and row["macs"] for row in products)
    assert rows["text_encoder"]["size"]["ratio"] < 0.5


def test_tokens_are_rows_of_integers_and_take_no_others(pipeline, folder: Path) -> None:  # type: ignore[no-untyped-def]
    path = "embeddings.token_embedding"
    table = pipeline.text_encoder.get_submodule(path)
    assert isinstance(table, IntegerEmbedding)
    stored = load_file(folder / "text_encoder" / "model.safetensors")[f"{path}.weight"]
    assert (stored.dtype, stored.numel()) == (torch.uint8, table.num_embeddings * table.embedding_dim)
    weight = sq.load("stepquant:characters-text").text_encoder.get_input_embeddings().weight
    assert (table.total_weight(torch.float32) - weight).abs().max() <= weight.abs().max() / 254 * 1.001
    with pytest.raises(RuntimeSupportError, match="takes no further ones"):
        pipeline.load_textual_inversion({"<mine>": torch.ones(table.embedding_dim)})


def test_an_altered_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    source = folder / "text_encoder"
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors | {name: tensors[name] ^ 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="was altered"):
        CLIPTextModel.from_pretrained(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ArtifactError, match="edited"):
        CLIPTextModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("feed", ["relu", "gated-gelu"])
def test_t5_runs_in_integers(feed: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    model = T5EncoderModel(T5Config(**settings, feed_forward_proj=feed)).eval()
    ids = torch.randint(0, 50, (2, 9))
    call = Received("forward", (ids,), {})
    part = seen_by(Part(model, "text_encoder"), [call])
    with torch.no_grad():
        wanted = model(ids).last_hidden_state
        hub.attach(model, fit_extremes(part, plan_for_parts(scheme("w8a8")), [{"call": call}]))
        got = model(ids).last_hidden_state
        model.save_pretrained(tmp_path)
        again = T5EncoderModel.from_pretrained(tmp_path)(ids).last_hidden_state
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(again, got)
    check_products(model, (ids,), 2)


def check_products(model: nn.Module, args: tuple[Any, ...], count: int) -> None:
    """As many attentions multiply integers, and nothing is multiplied between layers."""
    seen = traced(model, lambda: model(*args))
    products = [line for line in seen.lines if line.kind == "product"]
    assert len(products) == count
    assert all(line.integer and line.macs for line in products) == ops.compiled()
    assert seen.share_of_planned == 1 or not ops.compiled()


CAUSAL: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
}


@pytest.mark.parametrize("kind", [AutoencoderKLWan, AutoencoderKLQwenImage])
def test_a_causal_autoencoder_runs_in_integers(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind(**CAUSAL, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()
    latents = torch.randn(1, 4, 2, 8, 8)  # its second frame reads what was kept of the first
    call = Received("decode", (latents,), {"return_dict": False})
    part = seen_by(Part(model, "vae"), [call])
    assert set(part.stays_float().values()) == {NOT_CALLED}  # the attention of the encoder
    with torch.no_grad():
        wanted = model.decode(latents).sample
        hub.attach(model, fit_extremes(part, plan_for_parts(scheme("w8a8")), [{"call": call}]))
        got = model.decode(latents).sample
        model.save_pretrained(tmp_path)
        again = kind.from_pretrained(tmp_path).decode(latents).sample
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(again, got)
    covered = traced(model, lambda: call.repeat(model))
    assert any(line.integer and line.path.endswith("conv1") for line in covered.lines)
    (attention,) = (line for line in covered.lines if line.kind == "product" and line.macs)
    assert attention.integer == ops.compiled()  # over the pixels of each frame, and nothing beside it


CODERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "AutoencoderKL": (
        lambda: AutoencoderKL(
            sample_size=32,
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
        ),
        (1, 4, 20, 14),
    ),
    "AutoencoderKLWan": (
        lambda: AutoencoderKLWan(
            **CAUSAL, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=2
        ),
        (1, 4, 2, 14, 11),
    ),
}


@pytest.mark.parametrize("name", CODERS)
def test_tiles_and_slices_are_those_of_the_float_autoencoder(name: str) -> None:
    torch.manual_seed(0)
    build, shape = CODERS[name]
    model, latents = build().eval(), torch.randn(shape)
    model.enable_tiling()
    if name == "AutoencoderKL":
        model.tile_latent_min_size, model.tile_sample_min_size = 8, 16
    else:
        model.tile_sample_min_height = model.tile_sample_min_width = 16
        model.tile_sample_stride_height = model.tile_sample_stride_width = 12
    call = Received("decode", (latents,), {"return_dict": False})  # in tiles, as it is going to be called
    served = deepcopy(model)
    part = seen_by(Part(model, "vae"), [call])
    hub.attach(served, fit_extremes(part, plan_for_parts(scheme("w8a8")), [{"call": call}]))
    with torch.no_grad():
        tiled = model.decode(latents).sample
        got = [served.decode(latents).sample for _ in range(3)]
        assert all(torch.equal(one, got[0]) for one in got)
        assert (got[0] - tiled).norm() < 0.05 * tiled.norm()
        planned = [line for line in traced(served, lambda: call.repeat(served)).lines if line.planned]
        assert all(line.integer for line in planned if line.macs) == ops.compiled()
        for one in (model, served):
            one.disable_tiling()
            one.enable_slicing()
        both = torch.cat([latents, latents.flip(-1)])
        unsplit, alone = served.decode(both).sample, served.decode(latents).sample
        assert torch.equal(unsplit[:1], alone)
        assert (unsplit - model.decode(both).sample).norm() < 0.05 * unsplit.norm()
        assert (alone - tiled).norm() > 0.1 * tiled.norm()  # tiles are another image


@pytest.mark.parametrize(
    ("components", "words"),
    [
        (("unet", "text_encoder_2"), "no network 'text_encoder_2'"),
        (("unet", "tokenizer"), "no network 'tokenizer'"),
        (("vae",), "denoiser 'unet' is not among"),
    ],
)
def test_a_component_that_is_not_there_is_one_error(components: tuple[str, ...], words: str) -> None:
    pipe = sq.load("stepquant:characters-text")
    with pytest.raises(StepquantError, match=words):
        sq.quantize(pipe, method="minmax", components=components)


def test_a_component_without_layers_is_one_error() -> None:
    pipe = sq.load("stepquant:characters-text")
    pipe.register_modules(text_encoder=torch.nn.Embedding(3, 3))
    with pytest.raises(ModelError, match="no layer that could be quantized"):
        Part.named(pipe, "text_encoder")
