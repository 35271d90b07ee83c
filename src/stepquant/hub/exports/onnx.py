"""An ONNX graph of a network, with its integers, their scales and the ranges of its activations in it.

Weights are constants of one byte with DequantizeLinear behind them, inputs pass QuantizeLinear and DequantizeLinear:
what ONNX Runtime, OpenVINO and others turn into integer products of their own. Convolutions are written as such products,
because ONNX Runtime would not turn them into one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map

from stepquant.errors import RuntimeSupportError, StepquantError
from stepquant.hub.exports.at_rest import Network
from stepquant.hub.exports.nodes import OPSET
from stepquant.hub.exports.outlook import Fate, Outlook, check_float_form, left_of_steps
from stepquant.hub.exports.qdq import Place, by_windows, swap
from stepquant.hub.exports.windows import why_not, write_out
from stepquant.models.denoiser import Denoiser, prediction_of
from stepquant.progress import Progress
from stepquant.runtime.layers.convolution import IntegerConv2d
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.steps import StepTensors

ENDS = ".onnx"
NEEDED = ("onnx", "onnxscript")
OUTPUT = "prediction"
LARGEST = 1 << 30  # bytes of one file: beyond 2 GiB protobuf cannot go
STATIC, WEIGHTS, BY_ROW, FLOAT_ROW = "QDQ", "DequantizeLinear", "MatMulInteger", "round and multiply"
WINDOWS = "MatMulInteger of windows"
ROWS = "Gather, then scale"
UNKNOWN_T = "a t that the artifact has no entry for gives NaN"


class Graph(nn.Module):
    """The network as one function of its tensors: their names are those of its arguments."""

    def __init__(self, network: Network, arguments: Mapping[str, Any], windows: bool) -> None:
        super().__init__()
        self.model = nn.Module.float(network.model)  # numbers of 16 bits too, as its inputs are
        self.fixed = {name: value for name, value in arguments.items() if not tensors_in(value)}
        self.place, self.denoiser = Place(), (Denoiser(network.model),)
        steps = getattr(network.model, "steps", None)
        self.times: Tensor
        self.rows: Tensor
        self.factor: Tensor | None
        self.offset: Tensor | None
        self.steps = (steps,) if isinstance(steps, StepTensors) else ()
        for tensors in self.steps:
            known, correction = tensors.times(), tensors.correction()
            self.register_buffer("times", known.times.float())
            self.register_buffer("rows", known.rows)
            self.register_buffer("factor", None if correction is None else correction.scale)
            self.register_buffer("offset", None if correction is None else correction.bias)
        self.layers = tuple(swap(network.model, self.place, windows).values())

    def forward(self, given: dict[str, Any]) -> Tensor:
        if not self.steps:
            return self.predicted(given)
        t = given[self.denoiser[0].family.t].reshape(-1)[0].float()
        same = self.times == t
        at = same.to(torch.int64).argmax()
        self.place.row = self.rows[at]
        out = self.predicted(given)
        self.place.row = None
        if self.factor is not None and self.offset is not None:
            shape = (1, -1, *[1] * (out.ndim - 2))
            axis = self.denoiser[0].family.channels
            factor, offset = (x[at].reshape(shape).movedim(1, axis) for x in (self.factor, self.offset))
            out = out * factor + offset
        return torch.where(same.any(), out, torch.nan)

    def predicted(self, given: Mapping[str, Any]) -> Tensor:
        return prediction_of(self.model(**given, **self.fixed, return_dict=False))


def outlook(network: Network, arguments: Mapping[str, Any], windows: bool = True) -> Outlook:
    check_float_form(network, "a graph")
    if not isinstance(arguments[Denoiser(network.model).family.x], Tensor):
        raise RuntimeSupportError(
            f"no graph is made of {network.kind}: it takes a list of samples",
            fix="export its weights alone: --to gguf, sdnq or comfyui",
        )
    fates = [Fate(path, becomes(layer, windows)) for path, layer in network.layers.items()]
    fates += [Fate(path, ROWS) for path in network.tables]
    steps = network.config.artifact.steps
    notes, left = [f"the graph takes {shapes_text(network, arguments)}"], [*left_of_steps(network)]
    if steps is not None:
        notes.append(f"one t for all samples of a call; {UNKNOWN_T}")
        left += ["what the correction does to the noise of the sampler"] * (steps.noise != "none")
    notes += notes_on_convolutions(network) if windows else []
    return Outlook(tuple(fates), tuple(left), tuple(notes))


def becomes(layer: IntegerLayer, windows: bool) -> str:
    """The operation that multiplies, or what stands around it."""
    if windows and by_windows(layer):
        return WINDOWS
    if not layer.dynamic:
        return WEIGHTS if layer.spec.input is None else STATIC
    integers = len(layer.weight_shape) == 2 and layer.fits_signed_bytes()
    return BY_ROW if integers and layer.spec.weight.granularity != "group" else FLOAT_ROW


def notes_on_convolutions(network: Network) -> list[str]:
    """Those that stay convolutions."""
    convolutions = {path: one for path, one in network.layers.items() if isinstance(one, IntegerConv2d)}
    left = {path: why_not(one) for path, one in convolutions.items() if one.spec.input is not None}
    return [
        f"'{path}' stays a convolution, which ONNX Runtime computes in float: {why}"
        for path, why in left.items()
        if why
    ]


def check_installed(needed: Sequence[str] = NEEDED) -> None:
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise StepquantError(
            f"this format is written with {' and '.join(missing)}, not installed here",
            fix="pip install 'stepquant[export]'",
        )


def shapes_text(network: Network, arguments: Mapping[str, Any]) -> str:
    family = Denoiser(network.model).family
    x = arguments[family.x]
    return f"any number of samples of {' x '.join(map(str, x.shape[1:]))}"


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda one: found.append(one) if isinstance(one, Tensor) else None, value)
    return found


def names_in(given: Mapping[str, Any]) -> list[str]:
    """Of the tensors among the arguments: `timestep`, `added_cond_kwargs.time_ids`."""
    leaves, _ = tree_flatten_with_path(dict(given))
    return [
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in leaves
    ]


def prepared(network: Network, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the graph takes them: t for each sample, and all numbers that are no places in float32."""
    family = Denoiser(network.model).family
    samples = len(arguments[family.x])

    def one(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    made = {name: tree_map(one, value) for name, value in arguments.items() if tensors_in(value)}
    t = torch.as_tensor(arguments[family.t]).float()
    made[family.t] = t.expand(samples).clone() if t.ndim < 2 else t
    return made


def write(
    network: Network,
    seen: Outlook,
    file: Path,
    progress: Progress,
    arguments: Mapping[str, Any],
    windows: bool = True,
) -> None:
    given = prepared(network, arguments)
    graph = Graph(network, arguments, windows).eval()
    stages = progress.track(("tracing", "translating", "writing"), "exporting", 3)
    try:
        with silence(), torch.no_grad():
            next(stages)
            traced = traced_graph(graph, given, len(given[Denoiser(network.model).family.x]))
            next(stages)
            program: Any = torch.onnx.export(
                traced,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                input_names=names_in(given),
                output_names=[OUTPUT],
            )
    except Exception as error:  # whatever torch stumbles over in code of a model that was not written for it
        raise RuntimeSupportError(
            f"torch makes no graph of {network.kind}",
            got=(str(error).strip().splitlines() or [type(error).__name__])[0][:300],
            fix="export its weights alone: --to gguf, sdnq or comfyui",
        ) from error
    next(stages)
    write_out(program.model)
    for one in (program.model.graph, *program.model.graph.all_nodes()):
        one.metadata_props.clear()  # which lines of which files on this machine it was made by
    program.model.metadata_props.update({"made by": "stepquant", "artifact": network.config.digest})
    size = sum(value.nbytes for value in traced.state_dict.values())
    program.save(str(file), external_data=size > LARGEST)  # in a file of its own, with .data behind the name
    for _ in stages:
        pass


def traced_graph(graph: Graph, given: dict[str, Any], samples: int) -> torch.export.ExportedProgram:
    """The network's operations on any number of samples, where its code does not depend on that."""
    sizes: Any = torch.export.ShapesCollection()
    for value in tensors_in(given):
        if value.ndim and len(value) == samples:
            sizes[value] = {0: torch.export.Dim.AUTO}
    return torch.export.export(graph, (given,), dynamic_shapes=sizes, strict=False)


@contextmanager
def silence() -> Iterator[None]:
    """What the exporter says to its developers is not for users."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels):
            log.setLevel(level)
