from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stepquant.models.blocks.structure import structure
from stepquant.runtime.blocks.attention import Attention
from stepquant.runtime.blocks.resampling import Resample
from stepquant.runtime.blocks.residual import Residual
from stepquant.runtime.blocks.tail import NormOut
from stepquant.runtime.blocks.up import Up
from stepquant.runtime.lower import lower
from tests.runtime.synthetic import (
    VARIANTS,
    artifact_of,
    calling,
    check_blocks,
    make,
    noise,
    relative,
)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", [False, True])
def test_every_fused_block_computes_what_its_own_class_computes(variant: str, split: bool) -> None:
    """Each block alone, on the same input: the fused forward against the forward of its class over the same layers."""
    model = make(**VARIANTS[variant])
    lowered = lower(model, artifact_of(model, split), torch.float32)
    seen = check_blocks(lowered)
    calling(lowered)(100)
    assert seen or variant in ("scale and shift",)


@torch.no_grad()
def test_which_blocks_are_fused() -> None:
    model = make(downsample_padding=0)
    lowered = lower(model, artifact_of(model))
    kinds = dict.fromkeys((Residual, Attention, Resample, Up, NormOut), 0)
    for module in lowered.modules():
        forward = module.__dict__.get("forward")
        if type(forward) in kinds:
            kinds[type(forward)] += 1
    assert list(kinds.values()) == [8, 4, 2, 2, 1]
    assert not structure(make(resnet_time_scale_shift="scale_shift")).residuals


@torch.no_grad()
def test_rows_of_t_are_those_of_their_own_t() -> None:
    """One t for the batch, one t each, integers, floats and any order give what each alone gives."""
    model = make()
    x = noise(3, 3, 16, 16)
    artifact = artifact_of(model)
    lowered = lower(model, artifact, torch.float32)
    times = lowered.time_proj.forward.__self__
    alone = {t: lowered(x[:1], t).sample for t in (3, 4, 500)}
    assert not torch.equal(alone[3], alone[4])
    assert len(times.rows) == 3
    for t in (500, 3, 4):
        torch.testing.assert_close(lowered(x, t).sample[:1], alone[t])
        torch.testing.assert_close(lowered(x[:1], torch.tensor([float(t)])).sample, alone[t])
    mixed = lowered(x[:1].expand(3, -1, -1, -1), torch.tensor([3, 4, 500])).sample
    for row, t in zip(mixed, (3, 4, 500)):
        assert relative(row, alone[t][0]) < 2e-3
    other = lowered.state_dict()
    other["time_embedding.linear_1.bias"] = other["time_embedding.linear_1.bias"] + 1
    lowered.load_state_dict(other)
    assert not torch.equal(lowered(x[:1], 3).sample, alone[3])


def test_inference_mode_and_grad_mode_take_turns() -> None:
    model = make()
    x, artifact = noise(1, 3, 16, 16), artifact_of(model)
    lowered = lower(model, artifact)
    with torch.inference_mode():
        first = lowered(x, 7).sample
    assert torch.equal(lowered(x, 7).sample, first)
    with torch.no_grad():
        assert torch.equal(lowered(x, torch.tensor(7)).sample, first)


@torch.no_grad()
def test_another_processor_takes_over_from_the_fused_attention() -> None:
    model = make()
    x, artifact = noise(1, 3, 16, 16), artifact_of(model)
    lowered = lower(model, artifact, torch.float32)
    plain, calls = lowered(x, 5).sample, []

    class Counting:
        def __init__(self, former: Callable[..., Tensor]) -> None:
            self.former = former

        def __call__(self, attn: nn.Module, hidden_states: Tensor, **kwargs: object) -> Tensor:
            calls.append(attn)
            return self.former(attn, hidden_states)

    attention = lowered.mid_block.attentions[0]
    attention.processor = Counting(attention.processor)
    assert relative(lowered(x, 5).sample, plain) < 0.02
    assert calls == [attention]


@torch.no_grad()
def test_free_u_takes_the_way_of_the_class() -> None:
    model = make()
    x = noise(1, 3, 16, 16)
    artifact = artifact_of(model)
    lowered = lower(model, artifact, torch.float32)
    plain = lowered(x, 5).sample
    up = lowered.up_blocks[1]
    up.s1, up.s2, up.b1, up.b2, up.resolution_idx = 0.9, 0.2, 1.4, 1.6, 0
    changed = lowered(x, 5).sample
    assert not torch.equal(changed, plain)
    del up.forward
    torch.testing.assert_close(lowered(x, 5).sample, changed, rtol=1e-3, atol=1e-3)
