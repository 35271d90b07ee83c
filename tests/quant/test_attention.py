"""Attention whose probabilities are never all there: the same numbers, the same gradients, little memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Generator, Tensor

import stepquant
from stepquant.core import slices
from stepquant.core.grid import Grid
from stepquant.core.slices import Slices
from stepquant.core.steps import StepTable
from stepquant.fit.learnable import LearnedScale
from stepquant.job.memory import peak_bytes, reset_peak, resident_bytes
from stepquant.quant import attention
from stepquant.quant.attention import QuantProduct
from stepquant.quant.quantizer import Clock, Quantizer, Site

SCALES = {"query": 0.03, "key": 0.03, "value": 0.03, "probabilities": 0.2 / 255}


def product(clock: Clock | None = None) -> QuantProduct:
    ports = {}
    for port, scale in SCALES.items():
        kind = "tensor" if clock is None else "step"
        grid = Grid.parse(f"uint8/{kind}/sym" if port == "probabilities" else f"int8/{kind}")
        ports[port] = Quantizer(grid, Site("attention", "product", port), clock)  # type: ignore[arg-type]
        rows = torch.ones(1) if clock is None else torch.arange(1.0, 1 + clock.table.groups)
        ports[port].set_range(scale * rows, torch.zeros_like(rows))
        ports[port].enabled = True
    return QuantProduct(**ports)


def operands(mask: bool = False) -> tuple[Any, ...]:
    generator = Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 3, 8, generator=generator).transpose(1, 2) for tokens in (24, 40, 40))
    return q, k, v, torch.randn(2, 1, 24, 40, generator=generator) if mask else None, None


def test_what_nobody_looks_at_is_the_product_of_the_float_model() -> None:
    made, (q, k, v, *_) = product(), operands()
    for quantizer in made.ports().values():
        quantizer.enabled = False
    with torch.no_grad():
        assert torch.equal(made(q, k, v, None, None), F.scaled_dot_product_attention(q, k, v))
        made.probabilities.observer = lambda *_: None
        seen = made(q, k, v, None, None)
    torch.testing.assert_close(seen, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("at_once", [80, 1000, 2000], ids=["queries", "heads", "samples"])
@pytest.mark.parametrize("mask", [False, True])
def test_slices_return_what_all_at_once_returns(
    at_once: int, mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of another order may differ by a rounding: of a probability by one of its levels, of an output by its float."""
    table = Clock(StepTable.of(torch.tensor([5.0, 3.0])))
    table.read(torch.tensor([5.0, 3.0]), 2)
    for made in (product(), product(table)):
        made.correction = torch.tensor([1e-4])
        given = operands(mask)
        with torch.no_grad():
            expected = made(*given)
            monkeypatch.setattr(slices, "AT_ONCE", at_once)
            found = made(*given)
            monkeypatch.undo()
        exact = made.double()(*(x.double() if isinstance(x, Tensor) else x for x in given))
        rounding = torch.finfo(torch.float32).eps * expected.abs().max()
        assert (found - expected).abs().max() <= rounding
        assert (found - exact).abs().max() <= (expected - exact).abs().max() + rounding


@pytest.mark.parametrize("added", [False, True])
def test_masks_mean_what_they_mean_to_torch(added: bool) -> None:
    """Also to a query that may read nothing."""
    q, k, v, *_ = operands()
    made = product()
    for quantizer in made.ports().values():
        quantizer.enabled = False
    left = torch.rand(2, 1, 24, 40, generator=Generator().manual_seed(1)) < 0.5
    left[:, :, 3] = False
    mask = torch.where(left, torch.randn(2, 1, 24, 40), -torch.inf) if added else left
    found = made(q, k, v, mask, None)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))
    assert not found[:, :, 3].any()


def test_observers_see_every_probability_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, *rest = operands()
    seen: list[Tensor] = []

    def observe(quantizer: Quantizer, values: Slices) -> None:
        parts = [part.clone() for part in values]
        assert values.count == sum(part.numel() for part in parts)
        assert max(part.numel() for part in parts) <= 1000
        seen.append(torch.cat([part.flatten() for part in parts]))

    made = product()
    made.probabilities.observer = observe
    monkeypatch.setattr(slices, "AT_ONCE", 1000)
    made(q, k, v, *rest)
    exact = (made.query(q) @ made.key(k).mT / 8**0.5).softmax(-1)
    assert torch.allclose(seen[0].reshape(exact.shape), exact, atol=1e-6)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_gradients_pass_through_slices(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made again on the way back, with the same chance; where nothing is left to chance, those of all at once."""

    def gradients(**changes: Any) -> list[Tensor]:
        with monkeypatch.context() as patched:
            patched.setattr(slices, "AT_ONCE", changes.get("at_once", 1000))
            if changes.get("kept"):
                patched.setattr(attention, "checkpoint", lambda f, *args, **_: f(*args))
            made, generator = product(), Generator().manual_seed(1)
            learnt = [LearnedScale(quantizer, keep, generator) for quantizer in made.ports().values()]
            for quantizer, scale in zip(made.ports().values(), learnt):
                quantizer.stand_in = scale
            given = [x.requires_grad_() for x in operands()[:3]]
            out = made(*given, None, None)
            after = torch.rand(1, generator=generator)
            leaves = [*given, *(scale.factor for scale in learnt)]
            return [out.detach(), after, *torch.autograd.grad(out.square().sum(), leaves)]

    found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(kept=True), strict=True))
    if keep == 1:
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, gradients(at_once=1 << 20))
        )


def test_thirty_thousand_tokens_pass() -> None:
    """A matrix of them has 3.6 GB; here a few queries look at them all."""
    parts = slices.cuts(1, 1, 30_000, 30_000)
    assert max((part[2].stop - part[2].start) * 30_000 for part in parts) <= slices.AT_ONCE
    made, k = product(), torch.randn(1, 1, 30_000, 8)
    with torch.no_grad():
        assert made(k[:, :, :300], k, k, None, None).shape == (1, 1, 300, 8)


def test_quantizing_attention_takes_little_memory() -> None:
    """Four records of four heads over 1,024 tokens have matrices of 67 MB, of which not one is ever there."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = DDIMPipeline(unet.eval(), DDIMScheduler())
    reset_peak()
    before = resident_bytes()
    if peak_bytes() > before + (1 << 20):
        pytest.skip("this system does not count peaks anew")
    settings = {"samples": 4, "trajectories": 4}
    stepquant.quantize(pipe, method="minmax", steps=2, settings=settings)
    assert peak_bytes() - before < 64 << 20
