import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from stepquant.runtime.cpu import device as cpu_device
from stepquant.runtime.cpu import products as cpu
from stepquant.runtime.layers import layer as layers
from stepquant.runtime.layers.linear import IntegerLinear
from stepquant.runtime.layers.stored import not_needed_soon
from stepquant.runtime.lower import integer_layer
from stepquant.runtime.ops.code import Code
from tests.runtime.synthetic import expected, filled, grids, integer_sums

needs_integers = pytest.mark.skipif(cpu.why_no_integers(1) is not None, reason=str(cpu.why_no_integers(1)))
needs_groups = pytest.mark.skipif(cpu.why_no_integers(2) is not None, reason=str(cpu.why_no_integers(2)))

GEOMETRIES = {
    "3x3": (lambda: nn.Conv2d(16, 32, 3, padding=1), (2, 16, 8, 8)),
    "odd": (lambda: nn.Conv2d(7, 13, 3, padding=1), (1, 7, 5, 9)),
    "stem": (lambda: nn.Conv2d(3, 16, 3, padding=1), (2, 3, 11, 7)),
    "1x1": (lambda: nn.Conv2d(24, 5, 1), (3, 24, 4, 4)),
    "strided": (lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "strided 1x1": (lambda: nn.Conv2d(8, 8, 1, stride=2), (1, 8, 7, 7)),
    "dilated": (lambda: nn.Conv2d(8, 16, 3, padding=2, dilation=2), (1, 8, 9, 9)),
    "uneven kernel": (lambda: nn.Conv2d(8, 16, (1, 5), padding=(0, 2), stride=(2, 1)), (1, 8, 6, 9)),
    "uneven border": (lambda: nn.Conv2d(8, 16, 4, padding="same"), (1, 8, 6, 7)),
    "no border": (lambda: nn.Conv2d(8, 16, 3), (1, 8, 3, 3)),
    "groups": (lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (1, 32, 6, 6)),
    "no bias": (lambda: nn.Conv2d(8, 8, 3, bias=False), (1, 8, 5, 5)),
    "1d": (lambda: nn.Conv1d(6, 10, 5, padding=2, stride=2), (2, 6, 13)),
    "3d": (lambda: nn.Conv3d(6, 10, 3, padding=1), (2, 6, 4, 5, 7)),
    "frames": (lambda: nn.Conv3d(16, 8, (3, 1, 1), padding=(1, 0, 0)), (2, 16, 3, 4, 4)),
    "patches of video": (lambda: nn.Conv3d(4, 32, (1, 2, 2), stride=(1, 2, 2)), (1, 4, 3, 8, 6)),
    "3d strided": (lambda: nn.Conv3d(5, 8, 3, stride=2, dilation=(1, 2, 1), padding=1), (2, 5, 5, 9, 7)),
    "3d groups": (lambda: nn.Conv3d(8, 16, 3, padding=1, groups=4), (1, 8, 3, 4, 4)),
    "3d uneven border": (lambda: nn.Conv3d(4, 8, (2, 4, 3), padding="same"), (1, 4, 4, 6, 5)),
    "within frames": (
        lambda: nn.Conv3d(6, 10, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        (2, 6, 3, 5, 4),
    ),
    "within time": (
        lambda: nn.Conv3d(6, 10, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0)),
        (2, 6, 5, 3, 4),
    ),
    "linear": (lambda: nn.Linear(33, 17), (5, 33)),
    "linear one row": (lambda: nn.Linear(64, 3, bias=False), (1, 64)),
    "linear tokens": (lambda: nn.Linear(16, 48), (2, 7, 16)),
}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within one rounding of the output's dtype, and the few roundings of a float32 epilogue."""
    step = torch.finfo(got.dtype).eps * want.abs()
    assert ((got.double() - want).abs() <= step + 1e-6 * want.abs().max()).all()


@needs_integers
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_geometry_agrees_with_exact_sums(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = GEOMETRIES[name]
    layer = make()
    new, x = filled(layer, grids("int8/channel uint8/tensor"), -1.3, 2.9), torch.randn(shape).to(dtype)
    out, reason = new(x), cpu.why_no_integers(getattr(layer, "groups", 1))
    assert new.reason == reason
    assert out.dtype == dtype
    if reason is None or dtype == torch.float32:
        close(out, expected(layer, new, x))


@needs_integers
@pytest.mark.parametrize(
    "name", ["odd", pytest.param("depthwise", marks=needs_groups), "uneven border", "linear"]
)
def test_sums_are_the_same_integers(name: str) -> None:
    """With scales of one and no bias the output is the sum itself, which float32 holds exactly."""
    torch.manual_seed(0)
    make, shape = GEOMETRIES[name]
    layer = make()
    new, x = filled(layer, grids("int8/channel uint8/tensor"), -1.0, 1.5), torch.randn(shape)
    sums = integer_sums(layer, new, x)
    code = new.code
    new.weight_scale.fill_(1.0)
    new.bias = None
    new.kernel.code = Code(1.0, code.zero_point)
    new.kernel.bias, new.kernel.scales = None, torch.ones_like(new.kernel.scales)
    codes = layers.ops.quantize(x, code)
    codes = codes.contiguous(memory_format=torch.channels_last) if codes.dim() == 4 else codes
    assert torch.equal(new.from_codes(codes, torch.float32).double(), sums)


@needs_integers
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("inputs", ["uint{}/tensor", "int{}/tensor", "uint{}/tensor/sym"])
def test_every_width_of_weights_and_inputs(bits: int, inputs: str) -> None:
    torch.manual_seed(bits)
    layer, x = nn.Conv2d(9, 8, 3, padding=1), torch.randn(2, 9, 6, 6)
    new = filled(layer, grids(f"int{bits}/channel {inputs.format(bits)}"), -2.0, 2.0)
    close(new(x), expected(layer, new, x))
    assert new.integer


@needs_integers
@pytest.mark.parametrize("low, high, zero_point", [(0.0, 3.0, 0), (-3.0, 0.0, 255), (-1.0, 1.0, 128)])
def test_padding_is_the_zero_point(low: float, high: float, zero_point: int) -> None:
    layer, x = nn.Conv2d(4, 8, 3, padding=1), torch.full((1, 4, 4, 4), low + (high - low) * 0.9)
    new = filled(layer, grids("int8/channel uint8/tensor"), low, high)
    assert abs(new.code.zero_point - zero_point) <= 1
    close(new(x), expected(layer, new, x))


@needs_integers
def test_long_sums_of_the_greatest_products_do_not_saturate() -> None:
    layer = nn.Conv2d(512, 16, 3, padding=1)
    layer.weight.data.fill_(1.0)
    new, x = filled(layer, grids("int8/channel uint8/tensor"), 0.0, 1.0), torch.ones(1, 512, 6, 6)
    out = new(x)
    assert integer_sums(layer, new, x).max() == 512 * 9 * 255 * 127
    close(out, expected(layer, new, x))


@needs_integers
def test_inputs_beyond_the_range_are_clamped() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(3, 8) * 1000
    new = filled(layer, grids("int8/channel uint4/tensor"), -1.0, 1.0)
    close(new(x), expected(layer, new, x))


@needs_integers
def test_strides_of_the_input_do_not_matter() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    new, x = filled(layer, grids("int8/channel uint8/tensor"), -2.0, 2.0), torch.randn(2, 16, 6, 12)
    plain = x[:, ::2, :, ::2].contiguous()
    out = new(plain)
    for other in (
        x[:, ::2, :, ::2],
        plain.contiguous(memory_format=torch.channels_last),
        plain.mT.contiguous().mT,
    ):
        assert torch.equal(new(other), out)


@needs_integers
@pytest.mark.parametrize("onednn", [False, True])
def test_batches_of_any_size_one_after_another(onednn: bool) -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    # Small enough that no kernel of any machine saturates.
    new, x = filled(layer, grids("int6/channel uint8/tensor"), -2.0, 2.0), torch.randn(8, 16, 5, 5)
    if onednn:
        new.kernel.products = [None]
    whole = new(x)
    for batch in (1, 8, 1, 3, 2, 5, 1):
        assert torch.equal(new(x[:batch]), whole[:batch])
    assert not onednn or len(new.kernel.packed) == cpu.KEPT_SHAPES


@needs_integers
@pytest.mark.parametrize(
    "grid", ["int8/tensor", "int5/tensor", "uint4/channel", "uint7/channel", "int6/channel/asym"]
)
def test_weights_per_tensor_and_with_zero_points_of_up_to_seven_bits(grid: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, 3), torch.randn(1, 6, 6, 6)
    new = filled(layer, grids(f"{grid} uint8/tensor"), -2.0, 2.0)
    assert new.integer, new.reason
    close(new(x), expected(layer, new, x))


@needs_integers
def test_a_stored_byte_beyond_the_grid_is_not_taken_for_a_signed_one() -> None:
    new = filled(nn.Linear(8, 8), grids("int8/channel uint8/tensor"), -2.0, 2.0)
    assert new.integer
    new.weight[3] = 255
    new.forget()
    assert "signed byte" in str(new.prepared().reason)


def test_signed_bytes_are_the_integers_less_their_zero_points() -> None:
    for grid in ("int8/channel", "int3/tensor", "uint7/channel"):
        layer = filled(nn.Linear(16, 12), grids(f"{grid} uint8/tensor"), -2.0, 2.0)
        integers, zero_point = layer.rows()
        assert torch.equal(layer.signed_bytes().flatten(), (integers - zero_point).flatten())


def test_bytes_that_are_not_needed_soon_stay_true(tmp_path: Path) -> None:
    """Also those that were written to, which are no longer the file's."""
    data, file = torch.randint(0, 256, (100_000,), dtype=torch.uint8), tmp_path / "weights"
    file.write_bytes(data.numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=data.numel(), dtype=torch.uint8)
    mapped[20_000:30_000] = data[20_000:30_000] = 7
    for tensor in (mapped, mapped[1_001:90_000], mapped[::2], mapped[:5], data):
        not_needed_soon(tensor)
        assert torch.equal(mapped, data)


def test_what_has_no_integer_kernel_says_so_and_computes_the_same_numbers() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
    wide = filled(layer, grids("uint8/channel uint8/tensor"), -2.0, 2.0)
    close(wide(x), expected(layer, wide, x))
    assert "signed byte" in wide.reason
    groups = filled(layer, grids("int4/group24 uint8/tensor"), -2.0, 2.0)
    fake = copy.deepcopy(layer)
    fake.weight.data = groups.dequantized(torch.float32)
    code = groups.code
    inputs = (layers.ops.quantize(x, code).float() - code.zero_point) * code.scale
    torch.testing.assert_close(groups(x), fake(inputs), rtol=1e-5, atol=1e-6)
    assert not groups.integer
    assert "groups" in groups.reason


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_other_paddings_run_in_float(mode: str) -> None:
    layer, x = nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode), torch.randn(1, 4, 6, 6)
    new = filled(layer, grids("int8/channel uint8/tensor"), -2.0, 2.0)
    close(new(x), expected(layer, new, x))
    assert mode in new.reason


def test_a_cpu_that_saturates_runs_in_float_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_device, "why_no_integers", lambda groups: "products saturate")
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    new = filled(layer, grids("int8/channel uint8/tensor"), -2.0, 2.0)
    assert not new.integer
    assert new.reason == "products saturate"
    close(new(x), expected(layer, new, x))


@pytest.mark.skipif(not layers.ops.compiled(), reason="the extension stepquant._C was not built")
def test_where_onednn_saturates_only_groups_run_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not_onednn", lambda: "products saturate")
    spec = grids("int8/channel uint8/tensor")
    whole, grouped = (filled(nn.Conv2d(8, 8, 3, groups=groups), spec, -2.0, 2.0) for groups in (1, 2))
    assert whole.integer
    assert not grouped.integer
    assert grouped.reason == "products saturate, and own kernels take no groups"


def test_the_self_check_sees_saturation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of pairs clipped to 16 bits, as without VNNI, are not taken for good."""

    def clipped(self: cpu.PackedKernel, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        products = codes.flatten(1).int()[:, None, :] * self.weight().flatten(1).int()
        pairs = (products[..., ::2] + products[..., 1::2]).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(-1).to(dtype)

    monkeypatch.setattr(cpu.LinearKernel, "__call__", clipped)
    assert "saturate" in cpu.why_not_onednn.__wrapped__()


@pytest.mark.parametrize("grid", ["int8/channel", "int4/channel", "int3/group9", "uint8/channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_only_layers_multiply_dequantized_weights(grid: str, dtype: torch.dtype) -> None:
    layer, x = nn.Conv2d(9, 8, 3, padding=1), torch.randn(2, 9, 6, 6).to(dtype)
    new = filled(layer, grids(grid), 0, 0)
    weight = new.dequantized(dtype)
    densest = x.contiguous(memory_format=torch.channels_last)
    out = new(x)
    assert torch.equal(out, nn.functional.conv2d(densest, weight, layer.bias.to(dtype), padding=1))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (weight.float() - layer.weight).abs().max() < layer.weight.abs().max()
    assert "weight-only" in new.reason


@needs_integers
def test_adding_in_the_epilogue_rounds_once() -> None:
    torch.manual_seed(0)
    for layer, shape in ((nn.Conv2d(8, 8, 3, padding=1), (2, 8, 6, 6)), (nn.Linear(8, 8), (12, 8))):
        new, x = filled(layer, grids("int8/channel uint8/tensor"), -2.0, 2.0), torch.randn(shape)
        other = torch.randn(shape).to(torch.bfloat16)
        if len(shape) == 4:
            other, x = (y.contiguous(memory_format=torch.channels_last) for y in (other, x))
        want = expected(layer, new, x) + other.double()
        close(new.from_codes(layers.ops.quantize(x, new.code), torch.bfloat16, other.clone()), want)


@needs_integers
def test_layers_survive_copying_pickling_casting_and_loading() -> None:
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6)
    new = filled(layer, grids("int8/channel uint8/tensor"), -2.0, 2.0)
    out = new(x)
    assert torch.equal(copy.deepcopy(new)(x), out)
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), out)
    other = integer_layer(layer, new.spec, "layer")
    other(x)
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x), out)
    cast = copy.deepcopy(new).to(torch.bfloat16)
    assert cast.weight_scale.dtype == torch.float32
    assert torch.equal(cast(x), out)


def test_buffers_have_the_names_and_shapes_of_the_format() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(8, 6, 3)
    new = integer_layer(layer, grids("uint4/channel uint8/tensor"), "layer")
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in new.state_dict().items()}
    assert shapes == {
        "weight": ((8 * 6 * 9 // 2,), torch.uint8),
        "weight_scale": ((6,), torch.float32),
        "weight_zero_point": ((6,), torch.int16),
        "bias": ((6,), torch.float32),
        "input_scale": ((1,), torch.float32),
        "input_zero_point": ((1,), torch.int32),
    }
    assert new.weight.device.type == "meta"
    bare = integer_layer(nn.Linear(8, 6, bias=False), grids("int8/channel"), "layer")
    assert isinstance(bare, IntegerLinear)
    assert set(bare.state_dict()) == {"weight", "weight_scale"}
