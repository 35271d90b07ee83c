"""What ONNX Runtime makes of exported convolutions: python -m benchmarks.graphs [DIR MODEL].

Alone: one layer of random numbers, in float, as a convolution of rounded numbers, and as rows of codes, which is what is
written. With the folder of an artifact and the model that it was made of: the denoiser, of one sample and of eight. One thread, all in turns, by
the processor's clock.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import stepquant
from stepquant.artifact import LayerSpec
from stepquant.core.grid import Grid
from stepquant.hub.exports import onnx as graphs
from stepquant.hub.exports.nodes import OPSET
from stepquant.hub.exports.qdq import Place, exported
from stepquant.hub.exports.windows import write_out
from stepquant.hub.on_load import rounded
from stepquant.job.export import exporting
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Silent
from stepquant.runtime.lower import integer_layer

LAYERS = ((320, 32), (128, 256), (1280, 8), (32, 32))  # channels, pixels a side
SPEC = LayerSpec(Grid.parse("int8/channel"), Grid.parse("uint8/tensor"))
TURNS, BATCHES = 9, (1, 8)

Feeds = Mapping[str, Tensor]


def session(graph: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def layer_graph(layer: nn.Module, x: Tensor) -> bytes:
    program: Any = torch.onnx.export(
        torch.export.export(layer.eval(), (x,)), opset_version=OPSET, dynamo=True, verbose=False
    )
    write_out(program.model)
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


def one_layer(channels: int, side: int) -> tuple[dict[str, bytes], Feeds]:
    layer, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, side, side)
    packed = integer_layer(layer, SPEC, "")
    for name, value in rounded(layer.weight.detach(), SPEC).items():
        packed._buffers[name] = value
    packed.input_scale.fill_(0.03)
    packed.input_zero_point.fill_(128)
    made = {"float": layer_graph(layer, x)}
    made |= {
        name: layer_graph(exported(packed, Place(), windows), x)
        for name, windows in (("convolution", False), ("rows", True))
    }
    return made, {"": x}


def networks(folder: str, model: str) -> tuple[dict[str, bytes], Feeds]:
    """The denoiser of an artifact in both forms, and that of the float model."""
    made: dict[str, bytes] = {}
    with TemporaryDirectory() as place:
        for name, windows in (("convolution", False), ("rows", True)):
            one, file = exporting(folder, "onnx"), Path(place) / f"{name}.onnx"
            arguments = one.options["arguments"]
            graphs.write(one.network, one.outlook, file, Silent(), arguments, windows)
            made[name] = file.read_bytes()
            given = graphs.prepared(one.network, arguments)
    denoiser = Denoiser.of(stepquant.load(model)).model

    class Float(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = denoiser

        def forward(self, given: dict[str, Any]) -> Tensor:
            return graphs.prediction_of(self.model(**given, return_dict=False))

    traced = graphs.traced_graph(Float().eval(), given, len(given[Denoiser(denoiser).family.x]))  # type: ignore[arg-type]
    program: Any = torch.onnx.export(
        traced, opset_version=OPSET, dynamo=True, verbose=False, input_names=graphs.names_in(given)
    )
    file_of = io.BytesIO()
    program.save(file_of)
    return {"float": file_of.getvalue()} | made, given


def compare(what: str, made: Mapping[str, bytes], feeds: Feeds) -> None:
    def run(one: Any) -> Callable[[], object]:
        named = {i.name: feeds.get(i.name, next(iter(feeds.values()))).numpy() for i in one.get_inputs()}
        return lambda: one.run(None, named)

    runs = {name: run(session(graph)) for name, graph in made.items()}
    turns = [{name: seconds(act) for name, act in runs.items()} for _ in range(TURNS + 1)][1:]
    words = []
    for name in made:
        ratios = sorted(turn["float"] / turn[name] for turn in turns)
        spent = statistics.median(turn[name] for turn in turns) * 1e3
        times = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times float"
        words.append(f"{name} {spent:.2f} ms, {times}, {len(made[name]) / 1e6:.2f} MB")
    print(f"{what}: {'; '.join(words)}", flush=True)


def seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def main(folder: str = "", model: str = "") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        if folder:
            made, given = networks(folder, model)
            for batch in BATCHES:
                compare(f"{batch} samples", made, {name: sized(x, batch) for name, x in given.items()})
            return
        for channels, side in LAYERS:
            compare(f"{channels} channels, 3x3 on {side}x{side}", *one_layer(channels, side))


def sized(x: Tensor, batch: int) -> Tensor:
    return x[:1].expand(batch, *x.shape[1:]).contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
