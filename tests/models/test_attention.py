import copy

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from stepquant.errors import ModelError
from stepquant.models.denoiser import Denoiser
from stepquant.models.products import give_back, rebind
from tests.models.tiny import CASES


@pytest.mark.parametrize("name", ["plain", "text_to_image", "size_conditioned", "flux", "lumina2", "ltx"])
def test_rebinding_changes_nothing_but_the_product(name: str) -> None:
    model, arguments, _ = CASES[name]()
    model.eval()
    denoiser = Denoiser(model)
    before, calls = denoiser.predict(arguments), []

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        calls.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    keys = set(model.state_dict())
    attentions = [model.get_submodule(path) for path in denoiser.products()]
    former = [one.processor for one in attentions]
    for path, one in zip(denoiser.products(), attentions):
        rebind(one, product, path)
    assert torch.equal(denoiser.predict(arguments), before)
    assert len(calls) == len(attentions) > 0
    assert set(model.state_dict()) == keys
    assert torch.equal(Denoiser(copy.deepcopy(model)).predict(arguments), before)
    for one in attentions:
        give_back(one)
    assert [one.processor for one in attentions] == former


def test_an_inline_product_is_refused() -> None:
    model, _, _ = CASES["plain"]()
    path = Denoiser(model).products()[0]
    attention = model.get_submodule(path)
    attention.processor = AttnProcessor()
    with pytest.raises(ModelError, match=path):
        rebind(attention, lambda *_: None, path)


class Sharing:
    """A processor as those of newer networks: heads of queries share keys, and a mask names the keys that count."""

    def __call__(self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, enable_gqa=True)


def test_shared_heads_and_masks_of_keys_reach_the_product_spread_out() -> None:
    q, (k, v) = torch.randn(2, 5, 4, 8), torch.randn(2, 2, 7, 2, 8)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    attention = nn.Module()
    attention.processor = Sharing()
    before = attention.processor(attention, q, k, v, mask)
    shapes = []

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        shapes.append((q.shape, k.shape, v.shape, mask.shape))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    rebind(attention, product, "attention")
    assert torch.allclose(attention.processor(attention, q, k, v, mask), before, atol=1e-6)
    assert shapes == [((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), (2, 1, 1, 7))]


def test_an_attention_without_a_processor_is_refused() -> None:
    with pytest.raises(ModelError, match="inline"):
        rebind(nn.Module(), lambda *_: None, "attention")
