"""Convolutions and linears of codes against their specification: the same bytes, whatever the shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.cpu import products
from stepquant.runtime.cpu.products import ConvKernel, Geometry, LinearKernel
from stepquant.runtime.ops import Code, Product
from tests.runtime import reference

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
needs_onednn = pytest.mark.skipif(
    products.why_not_onednn() is not None, reason=str(products.why_not_onednn())
)
TYPES = [torch.bfloat16, torch.float32]

# batch, inputs, outputs, height, width, kernel, stride, sides (left, right, top, bottom), dilation, doubled
SHAPES = {
    "three by three": (2, 32, 64, 8, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "odd everything": (3, 12, 37, 7, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "one by one": (2, 20, 48, 6, 9, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), False),
    "one pixel": (1, 64, 16, 1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "rows in chunks and blocks": (3, 52, 150, 9, 11, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), False),
    "one tap and a border": (2, 20, 33, 5, 4, (1, 1), (1, 1), (1, 0, 2, 1), (1, 1), False),
    "every second pixel": (2, 20, 33, 5, 4, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), False),
    "one tap doubled": (2, 16, 33, 5, 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), True),
    "three outputs": (2, 32, 3, 9, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "five blocks": (1, 8, 330, 5, 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "three inputs": (2, 3, 20, 7, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "half a word": (3, 66, 33, 5, 3, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), False),
    "one input doubled": (2, 1, 1, 4, 4, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), True),
    "odd patches": (3, 48, 21, 7, 7, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "patches in chunks and blocks": (2, 16, 150, 17, 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "patches of a wide border": (2, 32, 17, 3, 4, (3, 3), (1, 1), (5, 2, 0, 7), (1, 1), False),
    "patches doubled": (1, 16, 20, 5, 7, (3, 3), (1, 1), (1, 2, 0, 1), (1, 1), True),
    "patches without border": (2, 32, 16, 13, 9, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), False),
    "patches of many channels": (2, 272, 20, 8, 9, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), False),
    "halving": (2, 16, 80, 9, 8, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), False),
    "border behind": (2, 16, 32, 8, 8, (3, 3), (2, 2), (0, 1, 0, 1), (1, 1), False),
    "wide border": (1, 4, 17, 3, 4, (3, 3), (1, 1), (5, 2, 0, 7), (1, 1), False),
    "dilated": (1, 8, 24, 11, 13, (3, 3), (1, 1), (2, 2, 3, 3), (3, 2), False),
    "tall kernel": (1, 24, 50, 10, 6, (5, 2), (2, 1), (0, 1, 2, 2), (1, 1), False),
    "doubled": (2, 16, 48, 5, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True),
    "doubled and halved": (1, 8, 16, 4, 3, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), True),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())


def random_weight(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator(1))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("zero_point", [0, 121, 255])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_convolve_gives_the_bytes_of_the_specification(
    name: str, dtype: torch.dtype, zero_point: int
) -> None:
    batch, inputs, outputs, height, width, kernel, stride, sides, dilation, doubled = SHAPES[name]
    codes, weight = random_bytes(batch, inputs, height, width), random_weight(outputs, inputs, *kernel)
    scale, bias = (
        torch.rand(outputs, generator=generator()) * 1e-3,
        torch.randn(outputs, generator=generator()),
    )
    walk = {"stride": stride, "sides": sides, "dilation": dilation, "doubled": doubled}
    product, code = Product.of(weight, scale, bias), Code(0.021, zero_point)
    plain = reference.convolve(codes, code.scale, zero_point, weight, scale, bias, dtype, None, **walk)
    got = product.convolve(channels_last(codes), code, dtype, None, **walk)
    assert torch.equal(got, plain)
    assert got.is_contiguous(memory_format=torch.channels_last)
    add = torch.randn(plain.shape, generator=generator(2)).to(dtype)
    want = reference.convolve(codes, code.scale, zero_point, weight, scale, bias, dtype, add, **walk)
    former = add.clone()
    assert torch.equal(product.convolve(channels_last(codes), code, dtype, add, **walk), want)
    assert torch.equal(add, former)
    walk["row_scale"] = torch.rand(batch, generator=generator(3))
    want = reference.convolve(codes, code.scale, zero_point, weight, scale, bias, dtype, add, **walk)
    assert torch.equal(product.convolve(channels_last(codes), code, dtype, add, **walk), want)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "slice of channels", "every second pixel", "parts of rows"])
def test_convolve_of_other_layouts(layout: str, taps: int) -> None:
    codes, weight, scale = random_bytes(2, 16, 6, 8), random_weight(32, 16, taps, taps), torch.ones(32)
    wide = channels_last(random_bytes(2, 40, 6, 8))
    given = {
        "contiguous": codes,
        "slice of channels": wide[:, 12:28],
        "every second pixel": channels_last(random_bytes(2, 16, 12, 16))[:, :, ::2, ::2],
        "parts of rows": channels_last(random_bytes(4, 16, 9, 12))[::2, :, :6, 2:10],
    }[layout]
    code, product, sides = Code(1.0, 3), Product.of(weight, scale, None), (taps // 2,) * 4
    want = reference.convolve(given, 1.0, 3, weight, scale, None, torch.float32, None, sides=sides)
    assert torch.equal(product.convolve(given, code, torch.float32, None, sides=sides), want)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "rows, inputs, outputs",
    [
        (1, 4, 1),
        (5, 36, 70),
        (17, 64, 48),
        (64, 128, 96),
        (30, 37, 9),
        (0, 8, 8),
        (203, 52, 70),
        (60, 1400, 33),
    ],
)
def test_linear_gives_the_bytes_of_the_specification(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    codes, weight = random_bytes(rows, inputs), random_weight(outputs, inputs)
    scale, bias = (
        torch.rand(outputs, generator=generator()) * 1e-3,
        torch.randn(outputs, generator=generator()),
    )
    product = Product.of(weight[:, :, None, None], scale, bias)
    add, gate = (torch.randn(rows, outputs, generator=generator(seed)) for seed in (2, 3))
    samples = next((n for n in range(2, rows + 1) if rows % n == 0), 1)
    own = torch.rand(rows, generator=generator(4))
    around = (
        (0, None, None),
        (255, add, None),
        (9, add, gate),
        (7, add, gate[:1]),
        (3, None, gate[:samples]),
        (128, None, None, own),
        (128, add, gate, own[:, None]),
    )
    for zero_point, *ends in around:
        want = reference.linear(codes, 0.5, zero_point, weight, scale, bias, dtype, *ends)
        assert torch.equal(product.linear(codes, Code(0.5, zero_point), dtype, *ends), want)
    wide = random_bytes(rows, inputs + 8)[:, 3 : 3 + inputs]
    want = reference.linear(wide, 0.5, 7, weight, scale, None, dtype)
    assert torch.equal(product._replace(bias=None).linear(wide, Code(0.5, 7), dtype), want)


@pytest.mark.parametrize("value, sign", [(255, 127), (255, -128), (0, -128)])
@pytest.mark.parametrize("inputs, size", [(512, 3), (128, 14), (144, 14), (1840, 14)])
def test_extreme_sums_are_exact(inputs: int, size: int, value: int, sign: int) -> None:
    """Small images, and larger ones, whose sums wrap around, with the most channels that are summed at once, and more."""
    codes = torch.full((1, inputs, size, size), value, dtype=torch.uint8)
    weight, scale = torch.full((16, inputs, 3, 3), sign, dtype=torch.int8), torch.ones(16)
    for zero_point in (0, 255):
        got = Product.of(weight, scale, None).convolve(codes, Code(1.0, zero_point), torch.float32)
        want = torch.tensor(float((value - zero_point) * sign * inputs * 9))
        assert (got == want).all()


@pytest.mark.parametrize("value", [1e-41, 1e-36, float("nan"), float("inf")])
def test_results_beyond_the_normal_numbers_are_rounded_as_ever(value: float) -> None:
    """Some processors round to bfloat16 with an instruction that takes subnormal numbers for zero."""
    codes, weight = random_bytes(2, 16, 9, 9), random_weight(20, 16, 3, 3)
    scale, bias = torch.full((20,), 1e-44), torch.zeros(20)
    bias[::3] = value
    for sides in ((1, 1, 1, 1), (0, 0, 0, 0)):
        want = reference.convolve(codes, 0.5, 9, weight, scale, bias, torch.bfloat16, None, sides=sides)
        product = Product.of(weight, scale, bias)
        got = product.convolve(channels_last(codes), Code(0.5, 9), torch.bfloat16, None, sides=sides)
        assert torch.equal(got.isnan(), want.isnan())
        same = got.view(torch.int16) == want.view(torch.int16)
        assert (same | want.isnan()).all()
        assert 0 < want[:, 1].abs().max() < 1e-38


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("images, outputs", [(3, 144), (1, 104), (1, 40)])
def test_thread_counts_give_the_same_bytes(images: int, outputs: int, taps: int) -> None:
    """However the output channels of few patches or rows are dealt out."""
    codes, weight = channels_last(random_bytes(images, 64, 13, 11)), random_weight(outputs, 64, taps, taps)
    scale, sides = torch.rand(outputs, generator=generator()), (taps // 2,) * 4
    want = reference.convolve(codes, 0.1, 9, weight, scale, None, torch.bfloat16, sides=sides)
    former = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 16):
            torch.set_num_threads(threads)
            product = Product.of(weight, scale, None)
            got = product.convolve(codes, Code(0.1, 9), torch.bfloat16, None, sides=sides)
            assert torch.equal(got, want), threads
    finally:
        torch.set_num_threads(former)


def test_operations_refuse_what_would_read_beyond_memory() -> None:
    product = Product.of(random_weight(16, 8, 3, 3), torch.ones(16), None)
    with pytest.raises(RuntimeError, match="does not fit"):
        product.convolve(random_bytes(1, 12, 4, 4), Code(1.0), torch.float32)
    with pytest.raises(RuntimeError, match="another shape"):
        product.convolve(random_bytes(1, 8, 4, 4), Code(1.0), torch.float32, torch.zeros(1, 16, 4, 4))
    with pytest.raises(RuntimeError, match="larger than"):
        product.convolve(random_bytes(1, 8, 2, 2), Code(1.0), torch.float32)
    with pytest.raises(RuntimeError, match="row_scale"):
        product.convolve(random_bytes(2, 8, 4, 4), Code(1.0), torch.float32, row_scale=torch.ones(3))
    rows = Product.of(random_weight(16, 8, 1, 1), torch.ones(16), None)
    with pytest.raises(RuntimeError, match="row_scale"):
        rows.linear(random_bytes(4, 8), Code(1.0), torch.float32, row_scale=torch.ones(1))


def test_fake_tensors_have_the_true_shapes_and_strides() -> None:
    conv, rows = Product.of(random_weight(20, 8, 3, 2), torch.ones(20), None), random_weight(20, 8)
    linear, tests = (
        Product.of(rows[:, :, None, None], torch.ones(20), None),
        ("test_schema", "test_faketensor"),
    )
    image = channels_last(random_bytes(2, 8, 7, 6))
    for doubled in (False, True):
        arguments = (image, 1.0, 3, *conv, (2, 1), (1, 0, 2, 3), (1, 2), doubled, torch.bfloat16)
        torch.library.opcheck(torch.ops.stepquant.convolve.default, arguments, test_utils=tests)
    arguments = (random_bytes(5, 8), 1.0, 3, *linear[:4], torch.float32)
    torch.library.opcheck(torch.ops.stepquant.linear.default, arguments, test_utils=tests)


@needs_onednn
@pytest.mark.parametrize("doubled", [False, True])
def test_the_kernel_and_onednn_agree(doubled: bool) -> None:
    """Two implementations of one layer: equal sums, so equal results up to the last bit of a float32."""
    codes, weight = channels_last(random_bytes(2, 32, 8, 8)), random_weight(48, 32, 3, 3)
    scale, bias = torch.rand(48, generator=generator()) * 1e-3, torch.randn(48, generator=generator())
    size, code = 17 if doubled else 9, Code(0.02, 100)
    into = channels_last(torch.randn(2, 48, size // 2, size // 2, generator=generator()))
    conv = ConvKernel(lambda: weight, scale, bias, code, Geometry((2, 2)))
    rows = LinearKernel(lambda: weight[:, :, 0, 0].contiguous(), scale, bias, code, Geometry())
    scales = torch.rand(9, generator=generator(5))

    def outs() -> tuple[Tensor, ...]:
        walk, flat = ((0, 1, 0, 1), doubled), random_bytes(9, 32)
        return (
            conv(codes, torch.float32, into.clone(), None, *walk),
            conv(codes, torch.float32, into.clone(), scales[:2], *walk),
            conv(codes, torch.float32, None, scales[:2, None, None, None], *walk),
            rows(flat, torch.float32),
            rows(flat, torch.float32, torch.ones(9, 48), None, scales),
            rows(flat, torch.float32, None, torch.full((1, 48), 0.5), scales[:, None]),
        )

    assert conv.product is not None
    assert rows.product is not None
    own = outs()
    conv.products, rows.products = [None], [None]
    torch.testing.assert_close(own, outs(), rtol=1e-6, atol=1e-5)


@needs_onednn
def test_layers_with_groups_go_to_onednn() -> None:
    weight = random_weight(16, 4, 3, 3)
    kernel = ConvKernel(
        lambda: weight, torch.ones(16), None, Code(1.0, 5), Geometry((1, 1), (1, 1), (1, 1), 2)
    )
    codes = channels_last(random_bytes(1, 8, 5, 5))
    assert kernel.product is None
    want = torch.nn.functional.conv2d(codes.double() - 5, weight.double(), None, 1, 1, 1, 2)
    assert torch.equal(kernel(codes, torch.float32).double(), want)
