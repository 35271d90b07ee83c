"""Graphs in the engines that they are for: every layer within one quantization step of ours, and where they run in integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from stepquant import hub, methods
from stepquant.artifact import StepSpec, table_tensors
from stepquant.calib.record import Source
from stepquant.core.grid import Grid
from stepquant.core.steps import StepCorrection, StepTable
from stepquant.hub.exports import onnx as graphs
from stepquant.hub.exports.at_rest import Network, at_rest
from stepquant.job.export import export
from stepquant.models.denoiser import Denoiser
from stepquant.progress import Silent
from stepquant.quant.plan import Rule
from stepquant.quant.schemes import scheme
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.lower import prepare
from tests.conftest import make_one_level
from tests.crafted import save
from tests.exports.conftest import Make

onnx: Any = pytest.importorskip("onnx", reason="graphs are written with onnx")
pytest.importorskip("onnxscript", reason="graphs are written with onnxscript")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="the outside engine is onnxruntime")


TABLES = ("GatherND", "Gather")


@pytest.fixture
def unet() -> UNet2DModel:
    return make_one_level()


def written(network: Network, given: dict[str, Any], file: Path) -> Path:
    arguments = {name: value for name, value in given.items() if value is not None}
    graphs.write(network, graphs.outlook(network, arguments), file, Silent(), arguments)
    return file


def watched(file: Path) -> tuple[bytes, dict[str, tuple[str, str]]]:
    """The graph with what every quantized layer reads and returns as outputs beside its own: path -> their names.

    A layer is known by its weight: what multiplies that reads the layer's input, behind its quantization if it has one.
    """
    model = onnx.load(file)
    made = {out: one for one in model.graph.node for out in one.output}

    def before(name: str, *kinds: str) -> str:
        """What a tensor was made of, if by operations of these kinds."""
        for kind in kinds:
            if name in made and made[name].op_type == kind:
                name = made[name].input[1 if kind in TABLES else 0]  # where a table is looked up, the place
        return name

    def reader(name: str, *kinds: str) -> Any:
        return next((one for one in model.graph.node if name in one.input and one.op_type in kinds), None)

    def last(name: str, *kinds: str) -> str:
        """What becomes of a tensor by operations of these kinds, as far as they follow."""
        for kind in kinds:
            one = reader(name, kind)
            name = one.output[0] if one is not None else name
        return name

    def biased(name: str, path: str) -> str:
        """With the bias of the layer, if it is added behind the sums."""
        sums = reader(name, "Add")
        added = sums is not None and any(one.endswith(f"{path}.bias") for one in sums.input)
        return sums.output[0] if added else name

    found = {}
    for constant in model.graph.initializer:
        if constant.name.endswith(".weights.codes"):
            path = constant.name.removeprefix("model.").removesuffix(".weights.codes")
            product = reader(constant.name, "MatMulInteger")
            if product is not None:  # of windows
                codes = before(product.input[0], *["Concat", "Slice"] * 3, "Pad", "Transpose")
                out = biased(last(product.output[0], "Cast", "Mul", "Concat", "Transpose"), path)
            else:
                product = reader(
                    reader(constant.name, "DequantizeLinear").output[0], "MatMul", "Conv", "Gemm"
                )
                codes = before(product.input[0], "DequantizeLinear")
                out = product.output[0] if product.op_type == "Conv" else biased(product.output[0], path)
            found[path] = (before(codes, *TABLES, "Unsqueeze", "Cast", "QuantizeLinear", "Clip"), out)
    names = sorted(
        {name for both in found.values() for name in both} - {one.name for one in model.graph.input}
    )
    for name in set(names) - {one.name for one in model.graph.output}:
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
    options = onnxruntime.SessionOptions()
    # Else it rounds the inputs of layers that have integers in their weights alone.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    fed = feeds(session, given)
    values = fed | dict(zip(names, session.run(names, fed)))
    ours = prepare(at_rest(network.folder).model, torch.float32, fuse=False)
    for path, (reads, out) in found.items():
        layer: Any = ours.get_submodule(path)
        with torch.no_grad():
            want = layer(torch.from_numpy(values[reads].copy()))
        apart = (torch.from_numpy(values[out]) - want).abs()
        rounding = 1e-5 * want.abs().max()
        if layer.spec.input is None:  # a product of floats
            assert apart.max() <= 1e-4 * want.abs().max(), path
            continue
        assert (apart <= one_code(layer).reshape(layer.bias_shape(want)) + rounding).all(), path
        assert (apart > rounding).float().mean() < 0.02, path  # and hardly any code differs
    return len(found)


def ours_in_float32(folder: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    model = prepare(at_rest(folder).model, torch.float32, fuse=False)

    def call(given: dict[str, Any]) -> np.ndarray:
        with torch.no_grad():
            return model(**given, return_dict=False)[0].numpy()  # type: ignore[no-any-return]

    return call


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_external_engines_compute_every_layer_of_a_unet(source: Source, tmp_path: Path) -> None:
    folder = save(source, tmp_path / "pipeline")
    network = at_rest(folder)
    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(500)}
    file = written(network, given, tmp_path / "a.onnx")
    given = graphs.prepared(network, given)
    assert check_layers(network, given, file) == len(network.config.layers)
    seen = {fate.path: fate.becomes for fate in graphs.outlook(network, given).fates}
    convolutions = {
        path
        for path, one in network.layers.items()
        if len(one.weight_shape) > 2 and one.spec.input is not None
    }
    assert {path for path, becomes in seen.items() if becomes == graphs.WINDOWS} == convolutions
    kinds = [one.op_type for one in onnx.load(file).graph.node]
    assert kinds.count("Conv") == 1  # the first, whose input is a float
    assert kinds.count("MatMulInteger") == len(convolutions) > 5
    told = {one.key: one.value for one in onnx.load(file).metadata_props}
    assert told["artifact"] == network.config.digest
    stored = {one.name: one.data_type for one in onnx.load(file).graph.initializer}
    codes = [kind for name, kind in stored.items() if name.endswith(".weights.codes")]
    assert set(codes) == {onnx.TensorProto.INT8}
    session = onnxruntime.InferenceSession(file)
    fed = feeds(session, given)
    want = session.run(None, fed)[0]
    assert apart(want, ours_in_float32(folder)(given)) < 0.03
    assert apart(session.run(None, {name: value[:1] for name, value in fed.items()})[0], want[:1]) < 0.03


@pytest.mark.parametrize("grid", ["uint4/tensor", "uint4/tensor/codebook"])
def test_external_runtime_reads_inputs_of_few_bits_that_layers_share(
    grid: str, source: Source, tmp_path: Path
) -> None:
    """Layers that read the same numbers clip, or move, them each in its own way."""
    rules = [Rule(Grid.parse(grid), "few bits", ("q", "k", "v", "conv"), ("input",))]
    denoiser = Denoiser.of(source.pipeline)
    plan = scheme("w8a8").with_rules(rules, "few")
    artifact = methods.build("minmax", {"samples": 8, "batch": 8})(denoiser, plan, source)
    scales = [name for name in artifact.tensors if name.endswith(".input_scale")]
    other = {name: artifact.tensors[name] * (1 + 0.01 * place) for place, name in enumerate(scales)}
    hub.attach(denoiser.model, replace(artifact, tensors={**artifact.tensors, **other}))
    source.pipeline.save_pretrained(tmp_path / "pipeline")
    network = at_rest(tmp_path / "pipeline" / "unet")
    given = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(500)}
    file = written(network, given, tmp_path / "a.onnx")
    assert check_layers(network, graphs.prepared(network, given), file) == len(network.config.layers)


def test_external_openvino_multiplies_convolutions_in_integers(source: Source, tmp_path: Path) -> None:
    openvino: Any = pytest.importorskip("openvino", reason="the outside engine is openvino")
    folder = save(source, tmp_path / "pipeline")
    done = export(folder.parent, tmp_path / "a.xml", to="openvino")
    assert sorted(one.name for one in tmp_path.glob("*a.*")) == ["a.bin", "a.xml"]
    compiled = openvino.Core().compile_model(tmp_path / "a.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = graphs.prepared(
        at_rest(folder), {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(500)}
    )
    got = compiled({name: value.numpy() for name, value in given.items()})[0]
    assert apart(got, ours_in_float32(folder)(given)) < 0.03
    ran = [one.get_rt_info() for one in compiled.get_runtime_model().get_ops()]
    words = [[info[key].astype(str) for key in ("layerType", "primitiveType")] for info in ran]
    integer = sum(
        kind in ("Convolution", "FullyConnected") and kernel.endswith("I8") for kind, kernel in words
    )
    planned = sum(fate.becomes == graphs.STATIC for fate in done.outlook.fates)
    assert 0.8 * planned < integer <= planned  # a few are too small for it


def test_external_runtime_reads_ranges_by_step_and_corrections(source: Source, tmp_path: Path) -> None:
    denoiser = Denoiser.of(source.pipeline)
    artifact = methods.build("minmax", {"samples": 8, "batch": 8})(denoiser, scheme("w8a8"), source)
    table, path = StepTable.of(source.times()), "down_blocks.0.resnets.0.conv1"
    layers = {**artifact.layers, path: replace(artifact.layers[path], input=Grid.parse("uint8/step"))}
    tensors = {**artifact.tensors, **table_tensors(table)}
    tensors[f"{path}.input_scale"] = tensors[f"{path}.input_scale"] * torch.linspace(0.2, 1, table.groups)
    tensors[f"{path}.input_zero_point"] = tensors[f"{path}.input_zero_point"].repeat(table.groups)
    made = replace(artifact, layers=layers, tensors=tensors, steps=StepSpec(len(table.times), table.groups))
    factors = torch.linspace(1, 2, len(table.times))[:, None].expand(-1, 3)
    hub.attach(denoiser.model, made.with_correction(StepCorrection(factors, factors, factors), table))
    source.pipeline.save_pretrained(tmp_path / "pipeline")
    folder = tmp_path / "pipeline" / "unet"
    network, sample = at_rest(folder), torch.randn(2, 3, 8, 8)
    times = [table.times[0], table.times[-1], torch.tensor(1.5)]
    calls = [{"sample": sample, "timestep": t.expand(2).float()} for t in times]
    session = onnxruntime.InferenceSession(written(network, calls[0], tmp_path / "a.onnx"))
    got = [session.run(None, feeds(session, given))[0] for given in calls]
    ours = ours_in_float32(folder)
    for mine, given in zip(got, calls[:2]):
        assert apart(mine, ours(given)) < 0.03
    assert apart(got[0], got[1]) > 0.3
    assert np.isnan(got[2]).all()


def test_external_runtime_quantizes_rows_as_they_come(
    rounded: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LARGEST", 0)  # so that numbers stand in a file of their own
    _, given, folder = rounded("class_transformer", rotation=4)
    network = at_rest(folder)
    file = written(network, given, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx.data").stat().st_size > 50_000
    assert b"site-packages" not in file.read_bytes()
    kinds = [one.op_type for one in onnx.load(file).graph.node]
    seen = graphs.outlook(network, given)
    integers = [fate for fate in seen.fates if fate.becomes in (graphs.BY_ROW, graphs.WINDOWS)]
    assert kinds.count("MatMulInteger") == len(integers) > 5
    session = onnxruntime.InferenceSession(file)
    given = graphs.prepared(network, given)
    assert apart(session.run(None, feeds(session, given))[0], ours_in_float32(folder)(given)) < 0.01
