import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from stepquant.errors import ModelError
from stepquant.models.attention import rebind
from stepquant.models.denoiser import Denoiser
from tests.models.tiny import CASES


@pytest.mark.parametrize("name", ["plain", "text_to_image", "size_conditioned"])
def test_rebinding_changes_nothing_but_the_product(name: str) -> None:
    model, arguments, _ = CASES[name]()
    model.eval()
    denoiser = Denoiser(model)
    before, calls = denoiser.predict(arguments), []

    def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        calls.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    keys = set(model.state_dict())
    former = {path: rebind(model.get_submodule(path), product, path) for path in denoiser.products()}
    assert torch.equal(denoiser.predict(arguments), before)
    assert len(calls) == len(former) > 0
    assert set(model.state_dict()) == keys
    assert torch.equal(Denoiser(copy.deepcopy(model)).predict(arguments), before)


def test_an_inline_product_is_refused() -> None:
    model, _, _ = CASES["plain"]()
    path = Denoiser(model).products()[0]
    attention = model.get_submodule(path)
    attention.processor = AttnProcessor()
    with pytest.raises(ModelError, match=path):
        rebind(attention, lambda *_: None, path)
