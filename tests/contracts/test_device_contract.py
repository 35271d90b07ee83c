"""Every operation on every device against the function that defines it; both are found, never named.

An operation is whatever `@Operation` decorates in a module of `runtime/ops`, a device whatever has a folder in `runtime`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant.runtime import device, ops
from stepquant.runtime.device import device_for
from stepquant.runtime.kernel import Geometry
from tests.pretended import DEVICE, Pretended, There, fetched
from tests.runtime.ops import examples as written
from tests.runtime.ops.examples import examples, packed

MODULES = [import_module(f"{ops.__name__}.{module.name}") for module in pkgutil.iter_modules(ops.__path__)]
OPERATIONS: dict[str, ops.Operation[..., Any]] = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, ops.Operation)
}
DEVICES = sorted(path.parent.name for path in Path(str(device.__file__)).parent.glob("*/device.py"))
LAYOUTS = ("pack_weight",)  # what they return is only for other operations of the same device
DOUBTFUL = 0.01  # share of the codes that may lie on the other side of a rounding
# Where numbers of the result hold a sum of exponentials, which kernels take to 3e-6, as a share of the largest.
COARSE = {"attention_by_row": 1e-5}


def example(name: str) -> tuple:
    torch.manual_seed(0)
    known = examples()
    if name not in known:
        pytest.fail(
            f"operation '{name}' has no example arguments: add them to examples() in {written.__file__}"
        )
    return known[name]


@contextmanager
def on(name: str) -> Iterator[tuple[torch.device, Callable[[Any], Any]]]:
    """The device, and how a tensor gets there; the plain one is pretended."""
    if name == "plain":
        with There():
            yield DEVICE, lambda value: Pretended(value) if isinstance(value, Tensor) else value
        return
    there = torch.device(name)
    if there.type != "cpu" and there != torch.accelerator.current_accelerator(check_available=True):
        pytest.skip(f"no device '{name}' on this machine")
    yield there, lambda value: value.to(there) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_defines_it(name: str, where: str) -> None:
    operation, given = OPERATIONS[name], example(name)
    want = operation.flat(*packed(given, PLAIN_PACK))
    with on(where) as (_, move):
        moved = packed(tuple(move(value) for value in given), lambda weight: ops.pack_weight(move(weight)))
        got = fetched(operation.overload(*moved))
    for one, other in zip(results(got), results(want)):
        assert difference(name, one.cpu(), other) is None


def results(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made


PLAIN_PACK = ops.pack_weight.plain


def difference(name: str, got: Tensor, want: Tensor) -> str | None:
    """What is wrong with `got`; None if it is a rounding at most."""
    if name in LAYOUTS:
        same = sorted(got[got != 0].tolist()) == sorted(want[want != 0].tolist())
        return None if same else "the packed bytes are not those of the weight"
    if (got.shape, got.dtype, got.stride()) != (want.shape, want.dtype, want.stride()):
        return f"{got.shape} {got.dtype} {got.stride()}, not {want.shape} {want.dtype} {want.stride()}"
    if not got.dtype.is_floating_point:
        apart = (got.int() - want.int()).abs()
        wrong = apart.max() > 1 or (apart > 0).float().mean() > DOUBTFUL
        return f"codes differ by up to {apart.max()}" if wrong else None
    furthest = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return (
        None
        if furthest <= COARSE.get(name, 4 * torch.finfo(got.dtype).eps)
        else f"numbers differ by {furthest:.2g} of the largest"
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_wrong_result_would_be_noticed(name: str) -> None:
    for want in results(OPERATIONS[name].flat(*packed(example(name), PLAIN_PACK))):
        wrong = want.clone()
        wrong[(0,) * wrong.dim()] += 2
        assert difference(name, want, want) is None
        assert difference(name, wrong, want) is not None
        assert name in LAYOUTS or difference(name, want.double(), want) is not None


def test_an_operation_without_example_says_where_to_add_one() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"'new' has no example arguments: add them to .*examples\.py"
    ):
        example("new")


def test_examples_are_of_operations_and_operations_are_offered() -> None:
    assert set(examples()) == set(OPERATIONS)
    assert set(OPERATIONS) <= set(ops.__all__)


@pytest.mark.parametrize("zero_point", [0, 131, 255])
@pytest.mark.parametrize("where", DEVICES)
def test_linears_are_exact(where: str, zero_point: int) -> None:
    codes, weight, scales, bias = layer((24, 40))
    code, into = ops.Code(0.5, zero_point), torch.ones(7, 24)
    want = (codes.double() - zero_point) @ weight.double().T * 0.5 + bias
    with on(where) as (there, move):
        if device_for(there).why_no_linear(there) is not None:
            pytest.skip("none on this device")
        kernel = device_for(there).linear(lambda: move(weight), move(scales), move(bias), code, Geometry())
        assert torch.equal(fetched(kernel(move(codes), torch.float32)).double().cpu(), want)
        assert torch.equal(fetched(kernel(move(codes), torch.float32, move(into))).double().cpu(), want + 1)


@pytest.mark.parametrize("geometry", [Geometry(padding=(1, 1)), Geometry((2, 1), (0, 1))])
@pytest.mark.parametrize("where", DEVICES)
def test_convolutions_are_exact(where: str, geometry: Geometry) -> None:
    codes, weight, scales, bias = layer((24, 8, 3, 3), (2, 8, 6, 7))
    code = ops.Code(0.5, 131)
    sums = torch.nn.functional.conv2d(
        codes.double() - 131, weight.double(), None, geometry.stride, geometry.padding
    )
    with on(where) as (there, move):
        if device_for(there).convolution is None or device_for(there).why_no_convolution(there, geometry):
            pytest.skip("none on this device")
        kernel = device_for(there).convolution(lambda: move(weight), move(scales), move(bias), code, geometry)
        got = fetched(kernel(move(codes), torch.float32)).double().cpu()
    assert torch.equal(got, sums * 0.5 + bias.reshape(1, -1, 1, 1))


def layer(weight: tuple[int, ...], image: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, signed bytes, scales of 1 and whole biases."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, image or (7, weight[1]), dtype=torch.uint8, generator=generator)
    made = torch.randint(-128, 128, weight, dtype=torch.int8, generator=generator)
    if image:
        codes = codes.contiguous(memory_format=torch.channels_last)
    return codes, made, torch.ones(weight[0]), torch.arange(weight[0]).float()
