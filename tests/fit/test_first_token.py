"""A text's first token: found where all texts share it, and left out of what is quantized."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stepquant.artifact import LayerSpec
from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import minmax
from stepquant.fit.first_token import FirstToken
from stepquant.quant.freeze import packed_tensors
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.runtime.blocks.attention import Readers
from stepquant.runtime.blocks.texts import project
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import integer_layer


def texts(seed: int = 0, outlier: float = 50.0) -> Tensor:
    """All begin with the same token, which is far greater than the others."""
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = outlier * torch.linspace(-1, 1, 16)
    return x


def seen(*batches: Tensor) -> Tensor | None:
    found = FirstToken()
    for x in batches:
        found.see(x, 2 * x)
    return found.known


def test_it_is_known_where_all_texts_begin_alike_and_go_on_otherwise() -> None:
    known = seen(texts(0), texts(1))
    assert torch.equal(known, 2 * texts()[0, 0])
    assert seen(texts(0), texts(1) + torch.eye(7)[0, :, None]) is None, "another beginning"
    assert seen(texts()[:1], texts()[:1]) is None, "one text says nothing about others"
    assert seen(texts()[:, :1]) is None, "nothing is left behind it"
    assert seen(texts()[0]) is None, "no tokens at all"


@pytest.fixture
def layers() -> tuple[QuantLayer, IntegerLayer, nn.Linear]:
    torch.manual_seed(0)
    whole = nn.Linear(16, 24).requires_grad_(False)
    made = [
        Quantizer(Grid.parse(text), Site("l", "k_text", port))
        for text, port in (("int8/channel", "weight"), ("uint8/tensor", "input"))
    ]
    layer = QuantLayer(copy.deepcopy(whole), "k_text", *made)
    layer.first = whole(texts()[0, 0])
    ranges = []
    layer.input_quantizer.observer = lambda _, values: ranges.append(values.ends)
    layer(texts())
    low, high = ranges[0]
    assert torch.equal(high, texts()[:, 1:].max().reshape(1)), "the outlier does not count"
    layer.input_quantizer.observer = None
    layer.input_quantizer.set_range(*scale_and_zero(low, high, layer.input_quantizer.grid))
    weights = layer.weight_quantizer
    weights.set_range(*scale_and_zero(*minmax(layer.weight, weights.grid), weights.grid))
    weights.enabled = layer.input_quantizer.enabled = True
    spec = LayerSpec(weights.grid, layer.input_quantizer.grid, first=True)
    runs = integer_layer(copy.deepcopy(whole), LayerSpec.from_json(spec.to_json()), "l")
    runs.load_state_dict(packed_tensors(layer))
    return layer, runs, whole


def test_what_is_simulated_is_what_runs_and_the_first_token_is_exact(
    layers: tuple[QuantLayer, IntegerLayer, nn.Linear],
) -> None:
    layer, runs, whole = layers
    x = texts(5)
    torch.testing.assert_close(runs(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(runs(x)[:, 0], whole(x)[:, 0], rtol=1e-5, atol=1e-5)
    others = (runs(x) - whole(x))[:, 1:].norm() / whole(x)[:, 1:].norm()
    assert others < 0.02, "the outlier would have taken most of eight bits"
    assert runs.integer
    assert runs.kernel is None, "whoever fuses blocks hands it floats"
    assert runs(x.bfloat16()).dtype == torch.bfloat16


def test_keys_and_values_that_are_made_once_for_a_text_know_it_too(
    layers: tuple[QuantLayer, IntegerLayer, nn.Linear],
) -> None:
    _, runs, _ = layers
    x = texts(5)
    for made in project(Readers(runs, runs), x):
        assert torch.equal(made, runs(x).flatten(0, 1))
