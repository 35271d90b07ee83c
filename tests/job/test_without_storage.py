"""Networks are built around their files: what those hold is neither reserved nor made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderOobleck, SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepquant.job.in_files import map_weights, without_storage
from stepquant.progress import Silent

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 2048,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SD3: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 96,
}


class Made(TorchDispatchMode):
    """The operations that run, and bytes of the tensors that they make in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = [0]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        there = [value for value in tree_leaves(out) if isinstance(value, Tensor) and not value.is_meta]
        self.sizes += [value.nbytes for value in there]
        self.names.add(str(func))
        return out


def test_tables_that_are_saved_are_not_made() -> None:
    """SD3 makes its table of places in float64, which of a published size is more memory than all else takes."""
    with Made() as made:
        model = without_storage(SD3Transformer2DModel, SD3)
    assert max(made.sizes) == 0
    assert all(value.is_meta for value in model.state_dict().values())
    assert "pos_embed.pos_embed" in model.state_dict()


def test_weights_are_not_reserved_where_tables_are_made() -> None:
    """Wan's angles are in no file."""
    usual = WanTransformer3DModel(**WAN)
    with Made() as made:
        model = without_storage(WanTransformer3DModel, WAN)
    tables = dict(model.named_buffers())
    assert tables
    assert all(torch.equal(value, tables[name]) for name, value in usual.named_buffers())
    assert all(value.is_meta for value in model.parameters())
    assert max(made.sizes) < max(value.nbytes for value in usual.parameters()) / 8


def test_weights_of_another_type_are_converted_on_their_way_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed again after each would lie in pieces between what stays: for Wan as much as all of its weights."""
    monkeypatch.setenv("STEPQUANT_CACHE", str(tmp_path / "cache"))
    saved = WanTransformer3DModel(**WAN).to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved")
    model = without_storage(WanTransformer3DModel, WAN)
    with Made() as made:
        map_weights(model, tmp_path / "saved", Silent())
    assert "aten.copy_.default" in made.names
    assert "aten._to_copy.default" not in made.names
    assert all(torch.equal(value, saved.get_parameter(name)) for name, value in model.named_parameters())
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_weights_that_layers_make_anew_take_no_memory() -> None:
    """Weight norm leaves a tensor at its layer, which it makes of two others before every call."""
    config = dict(AutoencoderOobleck(encoder_hidden_size=6, decoder_channels=3).config)
    model = without_storage(AutoencoderOobleck, config)
    assert all(value.is_meta for value in model.state_dict().values())
