"""Attentions of transformers keep their own code, masks and biases, and get another product."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from stepquant.models.part import Part, Received, seen_by
from stepquant.models.products import give_back, rebind

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def clip() -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**SMALL, max_position_embeddings=16))


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(**T5))


def umt5() -> nn.Module:
    return UMT5EncoderModel(UMT5Config(**T5))


def qwen2() -> nn.Module:
    """Its heads of queries share those of keys."""
    return Qwen2Model(Qwen2Config(**SMALL, num_key_value_heads=2))


ENCODERS: dict[str, Callable[[], nn.Module]] = {one.__name__: one for one in (clip, t5, umt5, qwen2)}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def read(model: nn.Module, **masks: Tensor) -> Tensor:
    ids = torch.arange(18).reshape(2, 9) + 3
    with torch.no_grad():
        found: Tensor = model(ids, **masks).last_hidden_state
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_nothing_changes_but_the_product(name: str, padded: bool) -> None:
    model = made(ENCODERS[name])
    masks = {"attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])} if padded else {}
    before, shapes = read(model, **masks), []

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        shapes.append((q.shape, k.shape, v.shape))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    part = Part(model, "text_encoder")
    paths, names = part.products(), set(model.state_dict())
    assert len(paths) == 2
    for path in paths:
        rebind(model.get_submodule(path), product, path)
    torch.testing.assert_close(read(model, **masks), before)
    assert shapes == [((2, 4, 9, 8),) * 3] * 2
    assert set(model.state_dict()) == names
    shapes.clear()
    torch.testing.assert_close(read(copy.deepcopy(model), **masks), before)
    assert len(shapes) == 2
    for path in paths:
        give_back(model.get_submodule(path))
    assert torch.equal(read(model, **masks), before)
    assert len(shapes) == 2


def test_a_copy_has_the_product_of_its_own_attention() -> None:
    model = made(clip)
    (path, *_) = Part(model, "text_encoder").products()
    attention: Any = model.get_submodule(path)
    attention.product = Doubling()
    rebind(attention, attention.product, path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own: Any = twin.get_submodule(path)
        assert own.forward.product is own.product is not attention.product
        assert own.forward.attention is own
        assert torch.equal(read(twin), read(model))


class Doubling(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        return 2 * torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def test_capped_scores_stay_float_and_say_so() -> None:
    sizes = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}
    model = made(lambda: Gemma2Model(Gemma2Config(**SMALL, **sizes)))
    call = Received("forward", (torch.arange(9)[None],), {})
    part = seen_by(Part(model, "text_encoder"), [call])
    reasons = {part.stays_float()[path] for path in part.products()}
    assert len(part.products()) == 2
    assert all("'eager'" in reason for reason in reasons)
