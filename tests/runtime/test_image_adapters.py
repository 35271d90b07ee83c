"""An IP-Adapter that is loaded into a quantized model runs in float beside its integers, and can be unloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from stepquant.errors import ModelError
from stepquant.job import quantize
from stepquant.quant.schemes import scheme
from stepquant.runtime.lower import lower
from tests.models.tiny import conditional
from tests.runtime.synthetic import noise, quantized, relative

WIDTH, EMBEDDED, TOKENS = 32, 16, 4
X, TEXT, IMAGE = noise(2, 4, 16, 16), noise(2, 7, WIDTH, seed=4), noise(2, EMBEDDED, seed=7)[:, None]


def adapter(model: UNet2DConditionModel) -> dict[str, Any]:
    """Weights as files of IP-Adapters hold them: keys and values for each cross-attention, and the projection of the image."""
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, Tensor] = {}
    crossing = [name for name in model.attn_processors if not name.endswith("attn1.processor")]
    for place, name in enumerate(crossing):
        width = model.get_submodule(name.removesuffix(".processor")).inner_dim
        for kind in ("k", "v"):
            weight = torch.randn(width, WIDTH, generator=generator) * 0.1
            layers[f"{2 * place + 1}.to_{kind}_ip.weight"] = weight
    projection = {
        "proj.weight": torch.randn(TOKENS * WIDTH, EMBEDDED, generator=generator) * 0.2,
        "proj.bias": torch.zeros(TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def unload(model: Any) -> None:
    """As `pipe.unload_ip_adapter()` does it."""
    model.encoder_hid_proj = None
    model.config.encoder_hid_dim_type = None
    model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})


@torch.no_grad()
def call(model: Any, image: Tensor | None = None) -> Tensor:
    more = {} if image is None else {"added_cond_kwargs": {"image_embeds": [image]}}
    return model(X, 3, encoder_hidden_states=TEXT, return_dict=False, **more)[0]


def test_an_adapter_follows_the_float_one_and_can_be_unloaded() -> None:
    torch.manual_seed(0)
    model = conditional().eval()
    artifact, _ = quantized(model, scheme("w8a8"), lambda t: model(X, t, TEXT).sample)
    lowered = lower(copy.deepcopy(model), artifact)
    plain = call(model)
    for one in (model, lowered):
        one._load_ip_adapter_weights([adapter(model)])
    wanted = call(model, IMAGE)
    for _ in range(2):
        assert relative(call(lowered, IMAGE), wanted) < 0.6 * relative(plain, wanted)
    unload(lowered)
    assert relative(call(lowered), plain) < 0.06


def test_a_pipeline_with_an_adapter_is_refused_before_anything_begins(
    text_pipeline: StableDiffusionPipeline,
) -> None:
    text_pipeline.unet._load_ip_adapter_weights([adapter(text_pipeline.unet)])
    with pytest.raises(ModelError, match="IP-Adapter") as raised:
        quantize(text_pipeline, prompts=["a"], method="minmax", samples=2, steps=2)
    assert "unload_ip_adapter" in str(raised.value)
