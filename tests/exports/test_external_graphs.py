"""Graphs in the engines that they are for: every layer within one quantization step of ours, and where they run in integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepquant.calib.record import Source
from stepquant.hub.exports import onnx as graphs
from stepquant.hub.exports.at_rest import Network, at_rest
from stepquant.job.export import export
from stepquant.progress import Silent
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import prepare
from tests.crafted import save
from tests.exports.conftest import Make

onnx: Any = pytest.importorskip("onnx", reason="graphs are written with onnx")
pytest.importorskip("onnxscript", reason="graphs are written with onnxscript")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="the outside engine is onnxruntime")


def written(network: Network, given: dict[str, Any], file: Path) -> Path:
    arguments = {name: value for name, value in given.items() if value is not None}
    graphs.write(network, graphs.outlook(network, arguments), file, Silent(), arguments)
    return file


def watched(file: Path) -> tuple[Any, dict[str, tuple[str, str]]]:
    """The graph with what every quantized layer reads and returns as outputs beside its own: path -> their names.

    A layer is known by its weight: what multiplies that reads the layer's input, behind its quantization if it has one.
    """
    model = onnx.load(file)
    made = {out: one for one in model.graph.node for out in one.output}
    readers: dict[str, list[Any]] = {}
    for one in model.graph.node:
        for name in one.input:
            readers.setdefault(name, []).append(one)
    found = {}
    for constant in model.graph.initializer:
        if not constant.name.endswith(".weights.codes"):
            continue
        path = constant.name.removeprefix("model.").removesuffix(".weights.codes")
        (dequantized,) = readers[constant.name]
        if dequantized.op_type != "DequantizeLinear":
            continue
        (product,) = readers[dequantized.output[0]]
        if product.op_type not in ("MatMul", "Conv", "Gemm"):
            continue
        reads = product.input[0]
        if made[reads].op_type == "DequantizeLinear":
            reads = made[made[reads].input[0]].input[0]
            if made.get(reads) is not None and made[reads].op_type == "Clip":
                reads = made[reads].input[0]
        out = product.output[0]
        if product.op_type == "MatMul" and any(one.op_type == "Add" for one in readers[out]):
            bias = [one for one in readers[out] if one.op_type == "Add" and any("bias" in n for n in one.input)]
            out = bias[0].output[0] if bias else out
        found[path] = (reads, out)
    for name in sorted({name for both in found.values() for name in both}):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model.SerializeToString(), found


def feeds(session: Any, given: dict[str, Any]) -> dict[str, np.ndarray]:
    return {one.name: given[one.name].numpy() for one in session.get_inputs()}


def one_code(layer: IntegerLayer) -> Tensor:
    """The most that one code of an input can change of the layer's output, by output channel."""
    assert layer.spec.input is not None
    weight = layer.dequantized(torch.float32).reshape(layer.weight_shape[0], -1)
    return weight.abs().amax(1) * float(layer.input_scale.max())


def check_layers(network: Network, given: dict[str, Any], file: Path) -> int:
    """Every layer of the graph, on what it read there, against ours; returns how many were compared."""
    data, found = watched(file)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = sorted({name for both in found.values() for name in both})
    values = dict(zip(names, session.run(names, feeds(session, given))))
    ours = prepare(at_rest(network.folder).model, torch.float32, fuse=False)
    for path, (reads, out) in found.items():
        layer: Any = ours.get_submodule(path)
        with torch.no_grad():
            want = layer(torch.from_numpy(values[reads].copy()))
        apart = (torch.from_numpy(values[out]) - want).abs()
        rounding = 2e-5 * want.abs().max()
        if layer.spec.input is None:
            assert apart.max() <= 1e-2 * want.abs().max() + 1e-5, path  # some engines round its inputs
            continue
        most = one_code(layer).reshape(layer.bias_shape(want)) + rounding
        assert (apart <= most).all(), path
        assert (apart > rounding).float().mean() < 0.02, path  # and hardly any code differs
    return len(found)


def test_external_runtime_computes_every_layer_of_a_unet(source: Source, tmp_path: Path) -> None:
    folder = save(source, tmp_path / "pipeline")
    network = at_rest(folder)
    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(500)}
    file = written(network, given, tmp_path / "a.onnx")
    given = graphs.prepared(network, given)
    assert check_layers(network, given, file) == len(network.config.layers)
    stored = {one.name: one.data_type for one in onnx.load(file).graph.initializer}
    codes = [kind for name, kind in stored.items() if name.endswith(".weights.codes")]
    assert set(codes) == {onnx.TensorProto.INT8}
    session = onnxruntime.InferenceSession(file)
    alone = {name: value[:1] for name, value in feeds(session, given).items()}
    want = session.run(None, feeds(session, given))[0]
    np.testing.assert_allclose(session.run(None, alone)[0], want[:1], rtol=0, atol=0.05 * np.abs(want).max())


def test_external_runtime_reads_ranges_by_step_and_corrections(source: Source, tmp_path: Path) -> None:
    pass
