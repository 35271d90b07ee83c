"""Peers to be measured against: OpenVINO in float, and in INT8 through NNCF. Needs `pip install stepquant[bench]`."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.evaluate.speed.turns import Call

HINTS = ("LATENCY", "THROUGHPUT")
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
Arguments = Mapping[str, Any]


class ByPosition(nn.Module):
    """The denoiser over a flat list of tensors, as converters want it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        out: Tensor = self.model(**unflatten(dict(zip(self.names, tensors))), return_dict=False)[0]
        return out


def convolves(model: nn.Module) -> bool:
    """Whether images or frames are convolved, by more than the one layer that makes tokens of patches."""
    return sum(isinstance(module, nn.Conv2d | nn.Conv3d) for module in model.modules()) > 1


def peers_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("openvino", "nncf"))


@contextmanager
def hushed() -> Iterator[None]:
    """NNCF greets and draws bars on our standard output, which is for results."""
    with redirect_stdout(io.StringIO()):
        yield


def convert(model: nn.Module, arguments: Arguments) -> Any:
    """The model in OpenVINO's representation, for the shapes of these arguments."""
    openvino = importlib.import_module("openvino")
    flat = flatten(arguments)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # tracing turns the model's checks of shapes into constants, as it should
        return openvino.convert_model(
            ByPosition(model, list(flat)).eval(),
            example_input=tuple(flat.values()),
            input=[list(value.shape) for value in flat.values()],
        )


def quantized(converted: Any, data: Sequence[Arguments], transformer: bool = False) -> Any:
    """NNCF's static INT8 of a converted model, calibrated on recorded calls of the same shapes, by its preset for
    transformers where it is one."""
    calls = [[value.numpy() for value in flatten(arguments).values()] for arguments in data]
    with hushed():
        nncf = importlib.import_module("nncf")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        preset = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
        return nncf.quantize(converted, nncf.Dataset(calls), subset_size=len(calls), **preset)


def caller(converted: Any, arguments: Arguments, dtype: torch.dtype, threads: int, hint: str) -> Call:
    """One synchronous inference, in `dtype` where the graph is not integer."""
    openvino = importlib.import_module("openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    inputs = [value.numpy() for value in flatten(arguments).values()]
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)


def openvino_calls(
    model: nn.Module,
    arguments: Arguments,
    dtype: torch.dtype,
    data: Sequence[Arguments] | None,
    threads: int,
) -> dict[str, Call]:
    """Ways to run the float model (no data) or its INT8 form, by performance hint."""
    converted = convert(model, arguments)
    if data is not None:
        converted = quantized(converted, data, transformer=not convolves(model))
    hints = HINTS if threads > 1 else HINTS[:1]  # which share out threads
    return {hint.lower(): caller(converted, arguments, dtype, threads, hint) for hint in hints}


def flatten(arguments: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors of nested arguments under dotted names; the places of a list are numbers."""
    return {name: value for name, value in leaves(arguments, prefix) if isinstance(value, Tensor)}


def leaves(arguments: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested arguments under dotted names."""
    pairs = arguments.items() if isinstance(arguments, Mapping) else enumerate(arguments)
    for name, value in pairs:
        if isinstance(value, Mapping | list | tuple):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *heads, last = name.split(".")
        place = nested
        for head in heads:
            place = place.setdefault(head, {})
        place[last] = value
    return {name: listed(value) for name, value in nested.items()}


def listed(value: Any) -> Any:
    """Tables whose names are numbers become lists."""
    if not isinstance(value, dict):
        return value
    inner = {name: listed(one) for name, one in value.items()}
    return [inner[name] for name in sorted(inner, key=int)] if all(map(str.isdecimal, inner)) else inner
