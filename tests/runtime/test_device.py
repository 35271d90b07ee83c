"""A model on a device that has no kernels of its own: the numbers of the processor's, within a rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.artifact import Artifact
from stepquant.errors import RuntimeSupportError
from stepquant.quant.schemes import scheme
from stepquant.runtime import lower, ops
from stepquant.runtime.coverage import coverage
from stepquant.runtime.device import device_for
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.layers.convolution import IntegerConv2d
from stepquant.runtime.moving import one_device
from tests import pretended as there
from tests.models.tiny import conditional, unconditional
from tests.pretended import DEVICE, Pretended, fetched, pretended
from tests.runtime.ops.examples import CODE, arguments
from tests.runtime.synthetic import filled, grids, quantized

no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
Frozen = tuple[nn.Module, Artifact, dict[str, Any]]


def unet() -> Frozen:
    model, x = unconditional().eval(), torch.randn(2, 3, 16, 16)
    artifact, _ = quantized(model, scheme("w8a8"), lambda t: model(x, t).sample)
    return model, artifact, {"sample": x}


def text_unet() -> Frozen:
    model, x, text = conditional().eval(), torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    artifact, _ = quantized(model, scheme("w4a8"), lambda t: model(x, t, text).sample)
    return model, artifact, {"sample": x, "encoder_hidden_states": text}


@pytest.mark.parametrize("made", [unet, text_unet])
def test_a_model_that_moves_there_errs_as_it_did(made: Callable[[], Frozen]) -> None:
    """A sum that is rounded otherwise turns a code over now and then, which is less than what quantizing costs."""
    torch.manual_seed(0)
    model, artifact, given = made()
    here = lower.lower(copy.deepcopy(model), artifact, torch.float32)
    there = lower.lower(copy.deepcopy(model), artifact, torch.float32)
    with torch.no_grad(), pretended(there):
        for t in (5, 5, 700):
            exact, want = (net(**given, timestep=torch.tensor(t)).sample for net in (model, here))
            moved = {name: Pretended(value) for name, value in given.items()}
            got = there(**moved, timestep=Pretended(torch.tensor(t))).sample
            assert isinstance(got, Pretended)
            assert (got.held - want).norm() < (want - exact).norm(), t
    reasons = {type(module): module.reason for module in there.modules() if hasattr(module, "reason")}
    assert DEVICE.type in reasons[IntegerConv2d]
    assert DEVICE.type in reasons[IntegerProduct]


@pytest.mark.parametrize(
    "text", ["int8/channel uint8/tensor", "int4/channel uint8/tensor", "int8/channel", "int4/group2"]
)
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(24, 10), (3, 7, 24)),
        (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 5)),
        (nn.Conv2d(8, 12, 3, 2, (1, 0), groups=4), (2, 8, 6, 5)),
        (nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    ],
)
def test_a_layer_that_moves_there_is_within_one_rounding(
    layer: nn.Module, shape: tuple[int, ...], text: str
) -> None:
    new, x = filled(layer, grids(text), -2.0, 2.0), torch.randn(shape)
    with torch.no_grad():
        want = new(x)
        with pretended(new):
            got = new(Pretended(x))
            integer = new.reason is None
    torch.testing.assert_close(fetched(got), want, rtol=2e-6, atol=2e-6)
    assert integer == (isinstance(layer, nn.Linear) and "uint8" in text)


def test_a_model_that_comes_back_is_the_one_it_was() -> None:
    torch.manual_seed(0)
    model, artifact, given = unet()
    lowered = lower.lower(model, artifact)
    with torch.no_grad():
        want = lowered(**given, timestep=5).sample
        with pretended(lowered):
            lowered(sample=Pretended(given["sample"]), timestep=Pretended(torch.tensor(5)))
            lowered._apply(fetched)
        assert torch.equal(lowered(**given, timestep=5).sample, want)


@pytest.mark.parametrize("name", arguments())
def test_every_operation_runs_there(name: str) -> None:
    operation, given = getattr(ops, name), arguments()[name]
    moved = [Pretended(value) if isinstance(value, Tensor) else value for value in given]
    got, want = operation.overload(*moved), operation.flat(*given)
    for one, other in zip(*([out] if isinstance(out, Tensor) else out for out in (got, want))):
        assert isinstance(one, Pretended)
        assert torch.equal(one.held, other)


def test_products_run_there() -> None:
    weight, codes = (
        torch.randint(-128, 128, (20, 8, 3, 3), dtype=torch.int8),
        torch.randint(0, 256, (2, 8, 5, 6)),
    )
    image, code, scales = codes.to(torch.uint8), ops.Code(0.1, 3), torch.rand(20)
    here = ops.Product.of(weight, scales, None)
    there = ops.Product.of(Pretended(weight), Pretended(scales), None)
    for dtype in (torch.float32, torch.bfloat16):
        want = here.convolve(image, code, dtype, sides=(1, 1, 1, 1))
        got = there.convolve(Pretended(image), code, dtype, sides=(1, 1, 1, 1))
        assert torch.equal(fetched(got), want)
    flat = (
        ops.Product.of(w[:, :, :1, :1], s, None)
        for w, s in ((weight, scales), (Pretended(weight), Pretended(scales)))
    )
    rows = image.flatten(2)[0].T
    want, got = (p.linear(x, code, torch.float32) for p, x in zip(flat, (rows, Pretended(rows))))
    assert torch.equal(fetched(got), want)


def test_what_ran_is_told() -> None:
    torch.manual_seed(0)
    model, artifact, given = unet()
    lowered = lower.lower(model, artifact)
    with pretended(lowered):
        lines = coverage(
            lowered, {"sample": Pretended(given["sample"]), "timestep": Pretended(torch.tensor(5))}
        ).lines
    ran = {line.integer for line in lines if line.path.endswith("to_q")}
    convolved = {line.integer for line in lines if "conv1" in line.path}
    assert (ran, convolved) == ({True}, {False})


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("rows, ins, outs", [(1, 5, 3), (40, 64, 24)])
def test_its_linears_are_exact(rows: int, ins: int, outs: int, zero_point: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, ins), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-128, 128, (outs, ins), dtype=torch.int8, generator=generator)
    code, scales, bias = ops.Code(0.5, zero_point), torch.ones(outs), torch.arange(outs).float()
    kernel = device_for(DEVICE).linear(lambda: weight, scales, bias, code, None)
    want = (codes.double() - zero_point) @ weight.double().T * 0.5 + bias
    assert torch.equal(kernel(codes, torch.float32).double(), want)
    into = torch.ones(rows, outs)
    assert torch.equal(kernel(codes, torch.float32, into).double(), want + 1)
    assert (into == 1).all()
    by_row = torch.arange(1.0, rows + 1)
    want = (want - bias) * by_row[:, None] + bias
    assert torch.equal(kernel(codes, torch.float32, None, None, by_row[:, None]).double(), want)


def test_an_operation_that_torch_lacks_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, compute = torch.randn(3, 4), there.compute

    def lacking(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.aten.round.default:
            raise NotImplementedError(
                f"Could not run '{func}' with arguments from that backend\n(a long list)"
            )
        return compute(func, args, kwargs)

    assert torch.equal(fetched(ops.quantize.default(Pretended(x), *CODE)), ops.quantize(x, CODE))
    monkeypatch.setattr(there, "compute", lacking)
    with pytest.raises(
        RuntimeSupportError, match="operation 'quantize' has no kernel for torch.float32 on pr"
    ) as said:
        ops.quantize.default(Pretended(x), *CODE)
    for words in ("pretended:0", "Could not run 'aten.round", "expected: bfloat16 or float32", "to('cpu')"):
        assert words in str(said.value)
    assert "long list" not in str(said.value)


@torch.no_grad()
@pytest.mark.parametrize("room", [1, 40])
@pytest.mark.parametrize(
    "move", [lambda tensor: Pretended(tensor.detach()), lambda tensor: tensor.bfloat16()]
)
def test_a_model_that_a_device_cannot_hold_stays_where_it_was(
    room: int, move: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model, artifact, given = unet()
    lowered, taken = lower.lower(model, artifact), []

    def take(tensor: Tensor) -> Tensor:
        if len(taken) >= room and tensor.numel():
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 MiB.\nMore of it")
        taken.append(tensor)
        return move(tensor)

    former = {name: (value.device, value.dtype) for name, value in lowered.state_dict().items()}
    want = lowered(**given, timestep=5).sample
    size = sum(value.numel() * value.element_size() for value in lowered.state_dict().values())
    with there.There(), pytest.raises(RuntimeSupportError, match="cannot hold the quantized model") as said:
        lowered._apply(take)
    assert len(taken) > room - 1
    assert f"{size:,} bytes" in str(said.value)
    assert f"device '{move(torch.empty(0)).device}'" in str(said.value)
    assert {name: (value.device, value.dtype) for name, value in lowered.state_dict().items()} == former
    for _ in range(3):
        assert torch.equal(lowered(**given, timestep=5).sample, want)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"conv_in": "cpu", "": torch.device("cpu")}])
def test_one_device_for_the_whole_network_is_found(device_map: Any) -> None:
    if device_map != "auto" or not torch.accelerator.is_available():
        assert one_device(device_map) == torch.device("cpu")


@pytest.mark.parametrize(
    "device_map, message",
    [
        ({"conv_in": "cpu", "": "disk"}, "lies on one device"),
        ({"": "meta"}, "lies on one device"),
        ({"conv_in": 0, "": 1}, "lies on one device"),
        ({"": "nowhere"}, "there is no device 'nowhere'"),
        pytest.param({"": 0}, "there is no device '0'", marks=no_accelerator),
        pytest.param({"": torch.device("cuda")}, "there is no device 'cuda'", marks=no_accelerator),
    ],
)
def test_other_device_maps_are_refused_in_one_sentence(device_map: Any, message: str) -> None:
    with pytest.raises(RuntimeSupportError, match=message) as said:
        one_device(device_map)
    assert "cpu" in str(said.value)
