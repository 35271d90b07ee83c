"""Every compiled operation against its specification in plain torch.

The contract: the same codes, except that a number whose scaled value lies within 1e-5 (relative) of a rounding boundary may
land one step beside it; such numbers are few and are counted.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.ops import Code
from tests.runtime import reference

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")

CODES = [Code(0.02, 128, 0, 255), Code(0.031, 0, 0, 255), Code(0.017, 255, 0, 255), Code(0.25, 136, 129, 143)]
DTYPES = [torch.bfloat16, torch.float32]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.5) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_codes(got: Tensor, exact: Tensor, code: Code, doubtful: float = 1e-3) -> None:
    """`got` are the codes of `exact` but for ties, which are at most the share `doubtful` of all."""
    want = reference.quantize(exact, code)
    assert got.dtype == torch.uint8
    assert got.shape == want.shape
    step = (got.int() - want.int()).abs()
    scaled = exact.double() / code.scale
    to_boundary = ((scaled - scaled.floor()) - 0.5).abs()
    at_boundary = to_boundary <= 1e-5 * (1 + scaled.abs())
    assert step.max() <= 1
    assert not (step.bool() & ~at_boundary).any()
    assert step.sum() <= max(1, doubtful * step.numel())


def norm_layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    base = numbers(2, 48, 7, 5, dtype=dtype)
    wide = channels_last(numbers(2, 96, 7, 5, dtype=dtype))
    return {
        "channels last": channels_last(base),
        "contiguous": base,
        "slice of channels": wide[:, 20:68],
        "every second row": channels_last(numbers(2, 48, 14, 5, dtype=dtype))[:, :, ::2],
        "transposed": channels_last(base).transpose(2, 3),
        "tokens": numbers(2, 35, 48, dtype=dtype).transpose(1, 2),
        "one pixel": numbers(2, 48, 1, 1, dtype=dtype),
        "batch 1": channels_last(base)[:1],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", norm_layouts(torch.float32))
@pytest.mark.parametrize("code", CODES)
def test_quantize_is_exact(layout: str, dtype: torch.dtype, code: Code) -> None:
    x = norm_layouts(dtype)[layout]
    got = ops.quantize(x, code)
    assert torch.equal(got, reference.quantize(x, code))
    assert got.stride() == torch.empty_like(x).stride()


def test_quantize_saturates_at_both_ends_and_rounds_halves_to_even() -> None:
    extremes = torch.tensor([3e38, -3e38, float("inf"), -float("inf"), 1e12, -1e12, 0.0, -0.0] * 9)
    for code in CODES:
        for dtype in DTYPES:
            x = extremes.to(dtype)
            assert torch.equal(ops.quantize(x, code), reference.quantize(x, code))
    halves = torch.arange(-80, 80) / 2
    assert torch.equal(
        ops.quantize(halves, Code(1.0, 77, 0, 255)), (torch.round(halves) + 77).to(torch.uint8)
    )


@pytest.mark.parametrize("size", [0, 1, 3, 15, 16, 17, 63, 64, 65, 100_003])
def test_quantize_of_any_length(size: int) -> None:
    x = numbers(size)
    assert torch.equal(ops.quantize(x, CODES[0]), reference.quantize(x, CODES[0]))


@pytest.mark.parametrize("layout", norm_layouts(torch.float32))
def test_moved_codes_are_those_of_the_table_where_they_were(layout: str) -> None:
    codes = (norm_layouts(torch.float32)[layout] * 100).int().to(torch.uint8)
    table = torch.randint(0, 256, (512,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))[::2]
    got, want = ops.move_codes(codes, table), ops.move_codes.plain(codes, table)
    assert torch.equal(got, table[codes.int()])
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(48, 48), (37, 90), (3, 1)])
def test_quantize_concat_is_exact(channels: tuple[int, int], dtype: torch.dtype) -> None:
    x, skip = (numbers(2, count, 6, 7, dtype=dtype, seed=count) for count in channels)
    for first, second in ((x, skip), (channels_last(x), channels_last(skip))):
        got = ops.quantize_concat(first, second, CODES[1])
        assert torch.equal(got, reference.quantize_concat(x, skip, CODES[1]))
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", norm_layouts(torch.float32))
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_group_norm_quantize_over_layouts(layout: str, activation: str, dtype: torch.dtype) -> None:
    x = norm_layouts(dtype)[layout]
    weight, bias = numbers(48, seed=1), numbers(48, seed=2)
    for code in CODES:
        got = ops.group_norm_quantize(x, weight, bias, 6, 1e-5, code, activation)
        assert_codes(got, reference.group_norm(x.float(), weight, bias, 6, 1e-5, activation), code)
        assert got.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels, groups", [((64, 64), 8), ((40, 24), 4), ((33, 15), 3), ((96, 32), 1), ((5, 3), 8)]
)
def test_group_norm_over_a_skip_concat_straddles_groups(
    channels: tuple[int, int], groups: int, dtype: torch.dtype
) -> None:
    x, skip = (channels_last(numbers(3, count, 9, 11, dtype=dtype, seed=count)) for count in channels)
    total = sum(channels)
    weight, bias = numbers(total, seed=1), numbers(total, seed=2)
    add, scale, shift = (numbers(3, total, dtype=dtype, seed=seed) for seed in (3, 4, 5))
    around = {"add": add, "scale": scale, "shift": shift, "skip": skip}
    exact = reference.group_norm(x.float(), weight, bias, groups, 1e-6, "silu", **around)
    got = ops.group_norm_quantize(x, weight, bias, groups, 1e-6, CODES[0], "silu", **around)
    assert_codes(got, exact, CODES[0])
    floats = ops.group_norm(x, weight, bias, groups, 1e-6, "silu", **around)
    assert floats.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(floats.float(), exact, rtol=tolerance, atol=1e-5)


def test_group_norm_without_affine_and_with_broadcast_time_embedding() -> None:
    x, add = numbers(3, 32, 4, 4), numbers(1, 32, 1, 1)
    got = ops.group_norm_quantize(x, None, None, 4, 1e-5, CODES[0], add=add)
    assert_codes(got, reference.group_norm(x, None, None, 4, 1e-5, add=add.expand(3, 32, 1, 1)), CODES[0])


def test_group_norm_of_constant_and_of_all_zero_channels() -> None:
    x = channels_last(numbers(2, 64, 8, 8))
    x[:, :16] = 0
    x[:, 16:32] = 3
    got = ops.group_norm_quantize(x, None, None, 4, 1e-5, CODES[0], "silu")
    assert (got[:, :32] == CODES[0].zero_point).all()
    assert_codes(got, reference.group_norm(x, None, None, 4, 1e-5, "silu"), CODES[0])


def test_group_norm_keeps_its_accuracy_far_from_zero() -> None:
    x = channels_last(numbers(1, 64, 32, 32) + 300)
    floats = ops.group_norm(x, None, None, 8, 1e-5)
    torch.testing.assert_close(floats, reference.group_norm(x, None, None, 8, 1e-5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 64), (3, 5, 7), (1, 1, 130), (2, 3, 4, 100), (5, 48)])
def test_layer_norm_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, width = numbers(*shape, dtype=dtype), shape[-1]
    weight, bias = numbers(width, seed=1), numbers(width, seed=2)
    scale, shift = (
        numbers(shape[0], width, seed=3, dtype=dtype),
        numbers(shape[0], width, seed=4, dtype=dtype),
    )
    for affine in ((weight, bias), (None, None)):
        for modulation in ((scale, shift), (None, None)):
            exact = torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-6).float()
            exact = exact if affine[0] is None else exact * weight + bias
            rows = (shape[0], *[1] * (len(shape) - 2), width)
            exact = (
                exact
                if modulation[0] is None
                else exact * (1 + scale.float().view(rows)) + shift.float().view(rows)
            )
            for code in CODES:
                assert_codes(ops.layer_norm_quantize(x, *affine, 1e-6, code, *modulation), exact, code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 64), (3, 5, 7), (1, 1, 130), (5, 48)])
def test_rms_as_layer_norm_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, width = numbers(*shape, dtype=dtype) + 1.0, shape[-1]  # a mean that must not be subtracted
    weight, scale, shift = numbers(width, seed=1), *numbers(2, shape[0], width, seed=3)
    rows = (shape[0], *[1] * (len(shape) - 2), width)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), eps=1e-6).float()
    changed = exact * weight * (1 + scale.view(rows)) + shift.view(rows)
    for code in CODES:
        assert_codes(ops.rms_norm_quantize(x, None, 1e-6, code), exact, code)
        assert_codes(ops.rms_norm_quantize(x, weight, 1e-6, code, scale, shift), changed, code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 64), (3, 5, 7), (1, 1, 130), (2, 0, 8), (2, 3, 4, 128)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, width = numbers(*shape, dtype=dtype) + 1.0, shape[-1]
    x = x.transpose(1, -2) if len(shape) == 4 else x  # heads before tokens
    weight, gate = numbers(width, seed=1), numbers(len(x), width, seed=3)
    exact = torch.nn.functional.rms_norm(x.double(), (width,), eps=1e-6)
    add = numbers(*x.shape, seed=4, dtype=dtype)
    gates = gate.double().view(len(x), *[1] * (len(shape) - 2), width)
    for out in (torch.float32, torch.bfloat16):
        tolerance = 1e-6 if out == torch.float32 else 2**-8
        torch.testing.assert_close(
            ops.rms_norm(x, weight, 1e-6, out).double(), exact * weight, rtol=tolerance, atol=1e-7
        )
        torch.testing.assert_close(
            ops.rms_norm(x, None, 1e-6, out).double(), exact, rtol=tolerance, atol=1e-7
        )
        torch.testing.assert_close(
            ops.rms_norm(x, weight, 1e-6, out, gate, add).double(),
            exact * weight * gates + add.to(out).double(),
            rtol=tolerance,
            atol=1e-5,
        )


def test_layer_norm_of_strided_tokens() -> None:
    x = numbers(2, 48, 5, 7).flatten(2).transpose(1, 2)
    assert_codes(
        ops.layer_norm_quantize(x, None, None, 1e-5, CODES[0]), reference.standardized(x, 1e-5), CODES[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "activation", ["none", "silu", "gelu", "gelu_tanh", "geglu", "swiglu", "swiglu_first"]
)
def test_activation_quantize(activation: str, dtype: torch.dtype) -> None:
    x = torch.cat(
        [numbers(3, 5, 150, dtype=dtype, spread=4), torch.linspace(-90, 90, 150).to(dtype).expand(3, 1, 150)],
        1,
    )
    for code in CODES:
        for layout in (x, x[:, 1:], x.transpose(0, 1)):
            got = ops.activation_quantize(layout, activation, code)
            assert_codes(got, reference.activate(layout.double(), activation).float(), code)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 64, 8, 8)])
def test_upsample_nearest2x_is_exact(shape: tuple[int, ...]) -> None:
    x = ops.quantize(numbers(*shape), CODES[0])
    for layout in (x, channels_last(x)):
        got = ops.upsample_nearest2x(layout)
        assert torch.equal(got, torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
        assert got.is_contiguous(memory_format=torch.channels_last)


def all_operations() -> dict[str, Tensor]:
    x, skip = channels_last(numbers(2, 96, 17, 16)), channels_last(numbers(2, 64, 17, 16, seed=1))
    tokens = numbers(2, 333, 96, seed=2)
    heads = tokens.view(2, 333, 3, 32).transpose(1, 2)
    probabilities = Code(1 / 255, 0, 0, 255)
    return {
        "quantize": ops.quantize(x, CODES[0]),
        "quantize_concat": ops.quantize_concat(x, skip, CODES[0]),
        "group_norm": ops.group_norm(x, None, None, 8, 1e-5, "silu", skip=skip),
        "group_norm of odd groups": ops.group_norm(x[:1, :80], None, None, 16, 1e-5, "silu"),
        "group_norm_quantize": ops.group_norm_quantize(x, None, None, 8, 1e-5, CODES[0], "silu", skip=skip),
        "layer_norm_quantize": ops.layer_norm_quantize(tokens, None, None, 1e-5, CODES[0]),
        "activation_quantize": ops.activation_quantize(tokens, "geglu", CODES[0]),
        "upsample_nearest2x": ops.upsample_nearest2x(ops.quantize(x, CODES[0])),
        "attention": ops.attention(heads, heads, heads, 0.2, *[CODES[0]] * 3, probabilities),
    }


def test_thread_counts_give_the_same_bytes() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(all_operations())
    finally:
        torch.set_num_threads(before)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def test_wrong_input_is_refused_with_a_reason() -> None:
    x = numbers(2, 10, 4, 4)
    with pytest.raises(RuntimeError, match="3 groups do not divide 10 channels"):
        ops.group_norm(x, None, None, 3, 1e-5)
    with pytest.raises(RuntimeError, match="unknown activation 'relu'"):
        ops.activation_quantize(x, "relu", CODES[0])
    with pytest.raises(RuntimeError, match="codes are bytes"):
        ops.quantize(x, Code(1.0, 0, 0, 256))
    with pytest.raises(RuntimeError, match="differ in more than their channels"):
        ops.quantize_concat(x, numbers(2, 10, 5, 4), CODES[0])
    with pytest.raises(RuntimeError, match="expected 2 rows of 10 numbers"):
        ops.group_norm(x, None, None, 5, 1e-5, add=numbers(2, 9))


def normed_twice(x: Tensor) -> Tensor:
    """Four groups of x, by the mean first and then the squares around it, in float64."""
    rows = x.double().reshape(len(x), 4, -1)
    rows = rows - rows.mean(-1, keepdim=True)
    return (rows * (rows.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).reshape(x.shape)


@pytest.mark.parametrize("far", [0.0, 30.0, 1e3, 1e4, -1e5])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("shape", [(2, 48, 16, 16), (1, 40, 5, 7)])
def test_a_group_norm_far_from_zero_keeps_its_digits(shape: tuple, activation: str, far: float) -> None:
    x = channels_last(numbers(*shape) + far)
    weight, bias = numbers(shape[1], seed=3), numbers(shape[1], seed=4)
    want = normed_twice(x) * weight.double()[:, None, None] + bias.double()[:, None, None]
    want = torch.nn.functional.silu(want) if activation == "silu" else want
    got = ops.group_norm(x, weight, bias, 4, 1e-5, activation)
    assert ((got.double() - want).norm() / want.norm()).item() < 3e-7


def test_a_group_norm_whose_first_pixel_is_far_from_the_others_keeps_its_digits() -> None:
    x = channels_last(numbers(1, 32, 32, 32))
    x[:, :, 0, 0] = 1e3
    want = normed_twice(x)
    got = ops.group_norm(x, None, None, 4, 1e-5)
    assert ((got.double() - want).norm() / want.norm()).item() < 3e-7
