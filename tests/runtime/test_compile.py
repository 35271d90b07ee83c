"""torch.compile over a lowered model: one graph without breaks, whose numbers are those of the call without it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from stepquant.artifact import Artifact
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.models.products import rebind
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.coverage import INTEGER_OPS
from stepquant.runtime.lower import lower
from tests.models.tiny import conditional, unconditional
from tests.runtime.synthetic import noise, quantized, relative

ONE_LEVEL: dict[str, Any] = {"block_out_channels": (16,), "layers_per_block": 1}
IMAGE = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
TIMES = (500, 10)
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


def corrected(artifact: Artifact) -> Artifact:
    """What is added to the prediction, and its factor, are others for every t."""
    times = StepTable.of(torch.tensor(TIMES))
    shape = (len(TIMES), 3)
    return artifact.with_correction(
        StepCorrection(1 + 0.1 * torch.rand(shape), torch.rand(shape), torch.zeros(shape)), times
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(("make", "finish"), [(image_model, corrected), (text_model, lambda plain: plain)])
def test_a_lowered_model_compiles_whole_to_the_same_numbers(make: Any, finish: Any) -> None:
    torch.manual_seed(0)
    model, others = make()
    x = noise(2, model.config.in_channels, 8, 8)
    artifact, _ = quantized(model.eval(), scheme("w8a8"), lambda t: model(x, t, *others).sample)
    lowered = lower(model, finish(artifact))
    want = {t: lowered(x, torch.tensor(t), *others).sample for t in TIMES}
    assert not torch.equal(want[TIMES[0]], want[TIMES[1]])
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
def test_a_transformer_compiles_whole_within_its_rounding() -> None:
    """Its block is of a class that diffusers lets torch.compile take as it is, and runs layer by layer there."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1,
                                  sample_size=8, patch_size=2, num_embeds_ada_norm=20, norm_num_groups=4).eval()  # fmt: skip
    nn.init.normal_(model.proj_out_2.weight, std=0.1)
    x, labels = noise(2, 4, 8, 8), torch.tensor([1, 2])

    def call(made: Any, t: int = 7) -> Tensor:
        return made(x, torch.tensor([t, t]), labels, return_dict=False)[0]

    artifact, _ = quantized(model, scheme("w8a8"), lambda t: call(model, t))
    lowered = lower(copy.deepcopy(model), artifact)
    exact, want = call(model), call(lowered)
    compiled = torch.compile(lowered, fullgraph=True, backend="eager")
    for _ in range(2):  # the second call finds weights packed, and is compiled anew
        assert relative(call(compiled), want) < 1.5 * relative(want, exact)


@torch.no_grad()
def test_attentions_go_on_in_their_own_globals_where_a_layer_breaks_the_graph() -> None:
    """As group offloading breaks it, where the tensors of a layer are brought."""
    pair = [Attention(8, heads=2, dim_head=4).eval() for _ in range(2)]
    for factor, attention in enumerate(pair, 1):
        rebind(attention, Scaled(factor), f"attention {factor}")
        attention.to_q.forward = torch.compiler.disable(attention.to_q.forward)
        attention.load_state_dict(pair[0].state_dict())
    x = noise(1, 4, 8)
    want = [attention(x) for attention in pair]
    assert not torch.equal(*want)
    for attention, out in zip(pair, want):
        assert torch.equal(torch.compile(attention, backend="eager")(x), out)


class Scaled:
    """A product that tells its attention from others."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: Any) -> Tensor:
        return self.factor * F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
