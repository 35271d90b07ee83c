"""Small models and pipelines that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from stepquant.calib.record import Source
from stepquant.core import ranges
from stepquant.models.sampling import Sampling
from stepquant.quant.plan import Plan
from stepquant.quant.schemes import scheme

torch.set_num_threads(1)  # the models of the tests are too small to share


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("STEPQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_unet(seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def without_ends(name: str) -> Plan:
    """A named scheme that treats the first and the last block as all others: tiny models have hardly any other."""
    return Plan(name, tuple(rule for rule in scheme(name).rules if not rule.ends))


def make_one_level(groups: int = 8) -> UNet2DModel:
    """A quarter of the work, with one of each: residual blocks, attention, a skip concatenation, a time block."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16,),
        norm_num_groups=groups,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ).eval()


@pytest.fixture
def unet() -> UNet2DModel:
    return make_unet()


@pytest.fixture
def pipeline(unet: UNet2DModel) -> DDIMPipeline:
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def source(pipeline: DDIMPipeline, tmp_path: Path) -> Source:
    return Source(pipeline, Sampling(10), batch=4, cache=tmp_path / "calibration")


@pytest.fixture
def text_pipeline() -> StableDiffusionPipeline:
    """A text-to-image pipeline with every component, random and tiny."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in letters:
        vocabulary |= {letter: len(vocabulary), f"{letter}</w>": len(vocabulary) + 1}
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae.eval(),
        encoder.eval(),
        transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet.eval(),
        DDIMScheduler(clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_class_pipeline() -> DiTPipeline:
    """A class-conditional pipeline, random and tiny; its last class stands for none."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
                                        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4)  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    vae = AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    names = {"0": "cat", "1": "frog, toad"}
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False), id2label=names)
    pipe.register_to_config(id2label=names)  # or it is not saved
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def class_pipeline() -> DiTPipeline:
    return make_class_pipeline()


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ranges to choose from: which one it is does not matter here."""
    for search in (ranges.lp_search, ranges.lp_search_binned):
        monkeypatch.setattr(search, "__kwdefaults__", search.__kwdefaults__ | {"candidates": 3})
