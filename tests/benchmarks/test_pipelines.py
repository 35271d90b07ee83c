"""Pipelines of published size: as many parameters as the checkpoints have, and embeddings that their networks take."""

from __future__ import annotations

import pytest
import torch
import transformers

from benchmarks import pipelines
from stepquant.models.denoiser import Denoiser

MILLIONS = {"sd1.5": 859.5, "sdxl": 2567.5, "sd3.5-medium": 2243.2, "wan-1.3b": 1419.0}


@pytest.mark.parametrize("name", MILLIONS)
def test_networks_have_their_published_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "drawn", lambda model: model)  # which has no storage
    pipe, asked = pipelines.PIPELINES[name](8, torch.bfloat16)
    model = Denoiser.of(pipe).model
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(1e6 * MILLIONS[name], rel=1e-4)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    width = getattr(model.config, "cross_attention_dim", None) or 4096
    assert asked["prompt_embeds"].shape[-1] == asked["negative_prompt_embeds"].shape[-1] == width


def test_every_other_pipeline_is_there_for_its_text_encoder() -> None:
    assert set(pipelines.PIPELINES) - set(MILLIONS) == set(pipelines.TEXTS)


def test_the_text_encoder_has_its_published_size() -> None:
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**pipelines.T5_XXL))
    assert sum(value.numel() for value in model.parameters()) == 4_762_310_656
