from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from stepquant.artifact import Artifact
from stepquant.models.blocks.structure import structure
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.texts import Texts
from stepquant.runtime.blocks.transformer import Block, Transformer
from stepquant.runtime.blocks.up import Up
from stepquant.runtime.coverage import coverage
from stepquant.runtime.lower import lower, prepare
from tests.models.tiny import conditional
from tests.runtime.synthetic import check_blocks, noise, quantized, relative

VARIANTS: dict[str, dict[str, Any]] = {
    "convolutions": {},
    "linears": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "one head": {"attention_head_dim": 1, "layers_per_block": 2},
    "two blocks each": {"transformer_layers_per_block": 2, "attention_head_dim": (4, 2)},
}
X = noise(2, 4, 16, 16, seed=3)


def make(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return conditional(**options).eval()


def words(tokens: int = 7, seed: int = 4) -> Tensor:
    return noise(2, tokens, 32, seed=seed)


def artifact_of(model: nn.Module, tokens: int = 7) -> Artifact:
    return quantized(model, scheme("w8a8"), lambda t: model(X, t, words(tokens)).sample)[0]


def blocks(model: nn.Module) -> list[Block]:
    return [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), Block)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[type[Chain]]:
    """The kinds of chains that went the way of their class."""
    found: list[type[Chain]] = []
    former: Callable[..., Any] = Chain.unfused

    def unfused(chain: Chain, *args: Any, **kwargs: Any) -> Any:
        found.append(type(chain))
        return former(chain, *args, **kwargs)

    monkeypatch.setattr(Chain, "unfused", unfused)
    return found


@torch.no_grad()
@pytest.mark.parametrize("tokens", [7, 77])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_computes_what_its_own_class_computes(
    variant: str, tokens: int, taken: list[type[Chain]]
) -> None:
    model = make(**VARIANTS[variant])
    lowered = lower(model, artifact_of(model, tokens), torch.float32)
    seen = check_blocks(lowered)
    lowered(X, 100, words(tokens))
    assert {Transformer, Block, Up} <= set(seen)
    assert not {Transformer, Block, Up} & set(taken)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_network_is_as_near_to_float_as_the_unfused(variant: str, dtype: torch.dtype) -> None:
    model = make(**VARIANTS[variant])
    x, true = X, model(X, 100, words()).sample
    lowered = lower(model, artifact_of(model), dtype)
    fused = [lowered(x, 100, words()).sample for _ in range(3)]
    assert all(torch.equal(one, fused[0]) for one in fused)
    unfused = prepare(lowered, dtype, fuse=False)(x, 100, words()).sample
    assert relative(fused[0], true) < 1.2 * relative(unfused, true)
    assert relative(fused[0], unfused) < 0.05


@torch.no_grad()
def test_every_layer_of_a_fused_block_is_seen_at_work() -> None:
    model = make()
    lowered = lower(model, artifact_of(model))
    arguments = {"sample": X, "timestep": torch.tensor(5), "encoder_hidden_states": words()}
    lowered(**arguments)
    found = coverage(lowered, arguments)
    assert all(line.macs for line in found.lines), [line.path for line in found.lines if not line.macs]
    assert found.share_of_planned == 1.0 or not ops.compiled()
    assert all(one.joins for block in blocks(lowered) for one in block.joints)


def test_what_is_declared() -> None:
    found = structure(make(layers_per_block=2))
    assert len(found.transformers) == len(found.text_blocks) == 6
    assert [block.linear for block in structure(make(use_linear_projection=True)).transformers] == [True] * 4
    assert [(block.textual, block.sized) for block in found.up_blocks] == [(False, True), (True, True)]
    assert found.text == "encoder_hidden_states"
    gated = make(attention_type="gated", cross_attention_dim=32)
    assert structure(gated).text_blocks, "without boxes its blocks are plain"
    assert not structure(make(only_cross_attention=True, mid_block_type=None)).text_blocks
    assert structure(make(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")).text is None
    normed = make()
    normed.mid_block.attentions[0].transformer_blocks[0].attn2.norm_q = nn.LayerNorm(16)
    assert len(structure(normed).text_blocks) == 3


class Other(AttnProcessor2_0):
    """Nothing but another processor."""


def chunk(model: UNet2DConditionModel) -> None:
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(16, 1)


MASK = {"encoder_attention_mask": torch.arange(7)[None].repeat(2, 1) < 3}
WAYS: dict[str, tuple[dict[str, Any], Callable[[UNet2DConditionModel], None]]] = {
    "mask": (MASK, lambda _: None),
    "arguments of attention": ({"cross_attention_kwargs": {"ip_adapter_masks": None}}, lambda _: None),
    "chunks": ({}, chunk),
    "processor": ({}, lambda model: model.set_attn_processor(Other())),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_what_a_chain_cannot_do_goes_the_way_of_the_class(way: str, taken: list[type[Chain]]) -> None:
    given, change = WAYS[way]
    model = make()
    lowered = lower(model, artifact_of(model), torch.float32)
    for _ in range(3):
        plain = lowered(X, 5, words()).sample
    assert Block not in taken
    change(lowered)
    got = [lowered(X, 5, words(), **given).sample for _ in range(3)]
    assert taken.count(Block) >= 4
    assert all(torch.equal(one, got[0]) for one in got), "a recorded call must not remember the other way"
    unfused = prepare(lowered, torch.float32, fuse=False)(X, 5, words(), **given).sample
    assert relative(got[0], unfused) < 0.05
    assert way != "mask" or relative(got[0], plain) > 0.05


@torch.no_grad()
def test_a_text_is_projected_once_and_another_one_anew() -> None:
    model = make()
    lowered = lower(model, artifact_of(model), torch.float32)
    own: Texts = blocks(lowered)[0].texts
    one, other = words(), words(seed=9)
    want = {id(text): type(lowered).forward(lowered, X, 5, text.clone()).sample for text in (one, other)}
    own.kept.clear()
    for text in (one, other, one, other, one):
        assert torch.equal(lowered(X, 5, text).sample, want[id(text)])
        assert len(own.kept) <= 2
    pairs = own.of(one)
    assert own.of(one) is pairs
    assert own.of(one.clone()) is not pairs
    assert torch.equal(lowered(X, 5, one).sample, want[id(one)])
    one.mul_(2)
    assert own.of(one) is not pairs
    doubled = lowered(X, 5, one).sample
    assert torch.equal(doubled, type(lowered).forward(lowered, X, 5, one.clone()).sample)
    assert not torch.equal(doubled, want[id(one)])
    assert not copy.deepcopy(own).kept


def test_a_text_that_cannot_be_followed_is_projected_at_every_call() -> None:
    model = make()
    with torch.no_grad():
        lowered = lower(model, artifact_of(model), torch.float32)
        want = lowered(X, 5, words()).sample
    own = blocks(lowered)[0].texts
    with torch.inference_mode():
        text = words().clone()
        assert own.of(text) is None
        for _ in range(3):
            assert torch.equal(lowered(X, 5, text).sample, want)
    assert own.of((words(), words())) is None
    assert own.of(None) is None
