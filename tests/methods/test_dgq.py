from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline
from torch import Tensor

from stepquant import methods
from stepquant.artifact import Artifact, ProductSpec
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize_log
from stepquant.core.grid import Grid, GridError
from stepquant.errors import ArtifactError, MethodError, PlanError
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.quant.attention import QuantProduct
from stepquant.quant.plan import Rule
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.quant.schemes import scheme
from stepquant.runtime.coverage import coverage
from stepquant.runtime.layers.attention_product import POWERS, IntegerProduct
from stepquant.runtime.lower import lower

pytestmark = pytest.mark.usefixtures("coarse")
GRIDS = {"query": "int8/tensor", "key": "int8/tensor", "value": "int8/tensor", "probabilities": "uint8/log"}


@pytest.fixture
def of_words(text_pipeline: StableDiffusionPipeline, source: Source) -> Source:
    return replace(source, pipeline=text_pipeline, sampling=Sampling(2, prompts=("ab", "c d")), batch=2)


def run(source: Source, plan: str = "w8a8", **settings: Any) -> Artifact:
    method = methods.build("dgq", {"samples": 16, "range_trajectories": 2} | settings)
    return method(Denoiser.of(source.pipeline), scheme(plan), source)


def nearest_power(x: float, most: float, qmax: int) -> float:
    """By trying all of them: the nearest by its logarithm."""
    if not x:
        return most * 2.0**-qmax
    return most * 2.0 ** -min(range(qmax + 1), key=lambda q: abs(math.log2(x / most) + q))


def test_powers_of_two_are_the_nearest_by_their_logarithm() -> None:
    x = torch.rand(3, 17, generator=torch.Generator().manual_seed(0)) ** 4
    x[1, 5], x[2] = 0.0, 0.0
    for bits in (2, 4, 8):
        found = fake_quantize_log(x, Grid.parse(f"uint{bits}/log"))
        for row, got in zip(x.tolist(), found.tolist()):
            want = [nearest_power(value, max(row), 2**bits - 1) if max(row) else 0.0 for value in row]
            assert got == pytest.approx(want, rel=1e-6)
    with pytest.raises(GridError, match="no sign"):
        Grid.parse("int8/log")


def quantized_product() -> QuantProduct:
    ports = {name: Quantizer(Grid.parse(grid), Site("a", "product", name)) for name, grid in GRIDS.items()}  # type: ignore[arg-type]
    for name, quantizer in ports.items():
        quantizer.enabled = True
        if name != "probabilities":
            quantizer.set_range(torch.tensor(0.03), torch.tensor(0.0))
    return QuantProduct(**ports)


@pytest.mark.parametrize("masked", [False, True])
def test_the_start_token_stays_and_words_are_powers_of_the_greatest(masked: bool) -> None:
    """A V = A_0 V_0 + s 2^-q V_1.., word by word, and the same from the integers of the artifact."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 6, 6))
    mask = (torch.arange(6) < 4).expand(2, 1, 5, 6) if masked else None
    product, spec = quantized_product(), ProductSpec.from_json(GRIDS | {"first": True})
    product.first = True
    operands = [port(x) for port, x in zip((product.query, product.key, product.value), (q, k, v))]
    scores = operands[0] @ operands[1].transpose(-1, -2) / math.sqrt(8)
    shares = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    want = torch.zeros(2, 3, 5, 8)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        row = shares[b, h, i].tolist()
        want[b, h, i] = row[0] * operands[2][b, h, 0]
        for j in range(1, 6):
            want[b, h, i] += nearest_power(row[j], max(row[1:]), 255) * operands[2][b, h, j]
    torch.testing.assert_close(product(q, k, v, mask, None), want, rtol=1e-4, atol=1e-5)

    stored = IntegerProduct(spec, torch.device("cpu"))
    assert set(stored._buffers) == {
        f"{p}_{n}" for p in ("query", "key", "value") for n in ("scale", "zero_point")
    }
    for port in ("query", "key", "value"):
        stored.get_buffer(f"{port}_scale").fill_(0.03)
    torch.testing.assert_close(stored(q, k, v, mask), want, rtol=1e-4, atol=1e-5)
    assert stored.reason == POWERS


def test_attention_to_words_alone_has_powers_of_two_and_what_is_made_runs(of_words: Source) -> None:
    artifact, model = run(of_words), of_words.pipeline.unet
    words = {path for path, spec in artifact.products.items() if spec.first}
    assert words == {path for path in artifact.products if path.endswith("attn2")}
    for path, spec in artifact.products.items():
        assert str(spec.probabilities) == ("uint8/log" if path in words else "uint8/step/sym")
        assert (f"{path}.product.probabilities_scale" in artifact.tensors) == (path not in words)
        assert ProductSpec.from_json(spec.to_json()) == spec
    inputs = {str(one.input) for path, one in artifact.layers.items() if "attentions" in path and one.input}
    assert inputs <= {"int8/token", "uint8/step"}
    assert any(spec.balanced for spec in artifact.layers.values())

    lowered = lower(copy.deepcopy(model), artifact, torch.float32)
    (records,) = of_words.record(every(1, [1])).batches(2)
    with torch.no_grad():
        want = Denoiser(model).predict(records.arguments)
        assert (Denoiser(lowered).predict(records.arguments) - want).norm() < 0.1 * want.norm()
    reasons = {line.path: line.reason for line in coverage(lowered, records.arguments).lines}
    assert all(reasons[path] == POWERS for path in words)


def test_each_part_can_be_left_out(of_words: Source) -> None:
    artifact = run(of_words, groups=1, text=False, by_step="never")
    assert artifact.steps is None
    assert not any(spec.first for spec in artifact.products.values())
    assert not any(spec.balanced for spec in artifact.layers.values())


def test_what_it_is_not_for_is_refused(of_words: Source, class_pipeline: DiTPipeline, source: Source) -> None:
    of_classes = replace(source, pipeline=class_pipeline, sampling=Sampling(2), batch=2)
    with pytest.raises(MethodError, match="begin with the same token"):
        run(of_classes, text=True)
    assert not any(spec.first for spec in run(of_classes).products.values())
    with pytest.raises(MethodError, match="no linear whose input channels"):
        run(of_words, "w4a16")
    wrong = Rule(Grid.parse("uint8/log"), "a test", ("product",), ("key",))
    with pytest.raises(PlanError, match="cannot carry uint8/log"):
        scheme("w8a8").with_rules([wrong]).resolve(Denoiser.of(class_pipeline))
    with pytest.raises(ArtifactError, match="no powers of two"):
        ProductSpec.from_json(GRIDS | {"probabilities": "uint8/tensor/sym", "first": True})


def test_the_batch_beside_it_changes_no_scale() -> None:
    """Scales are of each query, so that a picture does not depend on those that are drawn with it."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 1, 4, 8, generator=generator) for _ in range(3))
    product = quantized_product()
    product.first = True
    k[1] *= 5

    def made(of: Tensor, *rest: Tensor) -> Tensor:
        return product(of, *rest, None, None)

    torch.testing.assert_close(made(q, k, v)[:1], made(q[:1], k[:1], v[:1]))
