"""torch.compile over a lowered model: one graph without breaks, whose numbers are those of the call without it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from stepquant.calib.record import Source
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.coverage import INTEGER_OPS
from stepquant.runtime.lower import lower
from tests.models.tiny import conditional, unconditional
from tests.runtime.synthetic import noise, quantized

ONE_LEVEL: dict[str, Any] = {"block_out_channels": (16,), "layers_per_block": 1}
IMAGE = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
TEXT = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def image_model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return unconditional(**ONE_LEVEL, **IMAGE), ()


def text_model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return conditional(**ONE_LEVEL, **TEXT), (noise(2, 7, 32, seed=4),)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("make", [image_model, text_model])
def test_a_lowered_model_compiles_whole_to_the_same_numbers(make: Any) -> None:
    torch.manual_seed(0)
    model, others = make()
    x = noise(2, model.config.in_channels, 8, 8)
    artifact, _ = quantized(model.eval(), scheme("w8a8"), lambda t: model(x, t, *others).sample)
    lowered = lower(model, artifact)
    want = {t: lowered(x, torch.tensor(t), *others).sample for t in (10, 500)}
    graphs: list[Counter[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        names = (node.target.name() for node in graph.graph.nodes if hasattr(node.target, "_schema"))
        graphs.append(Counter(name.partition(".")[0] for name in names))
        return aot_eager(graph, inputs)

    compiled = torch.compile(lowered, fullgraph=True, backend=backend)
    for t, out in want.items():
        assert torch.equal(compiled(x, torch.tensor(t), *others).sample, out)
    assert len(graphs) == 1
    assert not ops.compiled() or graphs[0]["stepquant::attention"] == 4 + 4 * len(others)
    assert not ops.compiled() or sum(graphs[0][name] for name in INTEGER_OPS) > 12


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_corrected_model_compiles_whole(source: Source) -> None:
    torch.manual_seed(0)
    times = StepTable.of(source.times())
    shape = (len(times.times), 3)
    correction = StepCorrection(1 + 0.1 * torch.rand(shape), torch.rand(shape), torch.zeros(shape))
    model = copy.deepcopy(source.pipeline.unet)
    plain, _ = quantized(model, scheme("w8a8"), lambda t: model(noise(2, 3, 8, 8), t).sample)
    lowered = lower(source.pipeline.unet, plain.with_correction(correction, times))
    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    for t in source.times()[2:4]:
        x = noise(2, 3, 8, 8, seed=int(t))
        assert torch.equal(compiled(x, t).sample, lowered(x, t).sample)
