"""ONNX Runtime: QDQ in INT8 as its own quantizer makes it of the float graph; convolutions and linears, rows of weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from benchmarks.engines.given import Given

OPSET, KINDS = 20, ["Conv", "MatMul", "Gemm"]
GRAPH, RANGES = "graph.onnx", "ranges.json"


def prepare(given: Given) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    given.own.mkdir(parents=True)
    with TemporaryDirectory(dir=given.own) as folder:
        place = Path(folder)
        convert(given, place / GRAPH)
        measure(given, place / GRAPH, place / RANGES)
        quantize_static(
            place / GRAPH,
            given.own / GRAPH,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=KINDS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=place / RANGES,
            extra_options={"ActivationSymmetric": False, "WeightSymmetric": True, "MatMulConstBOnly": True},
        )


def measure(given: Given, file: Path, ranges: Path) -> None:
    """The extremes of all activations by its own calibrater, which alone holds the graph while it runs."""
    from onnxruntime import InferenceSession
    from onnxruntime.quantization.calibrate import MinMaxCalibrater, save_tensors_data

    calls = iter(given.calls())

    class Calls:
        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(calls, None)

    with TemporaryDirectory(dir=given.own) as folder:
        augmented = str(Path(folder) / GRAPH)
        calibrater = MinMaxCalibrater(file, KINDS, augmented, use_external_data_format=True)
        calibrater.augment_graph()
        calibrater.model = None  # as quantize_static does it, these weights lie beside those of the session
        calibrater.infer_session = InferenceSession(augmented, frugal(), providers=["CPUExecutionProvider"])
        calibrater.collect_data(Calls())
        save_tensors_data(calibrater.compute_data(), ranges)


def frugal() -> Any:
    """The options of its calibrater, but that extremes are taken where they arise, and not in the end of all activations."""
    from onnxruntime import ExecutionOrder, GraphOptimizationLevel, SessionOptions

    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    return options


def convert(given: Given, file: Path) -> None:
    import torch

    from benchmarks.engines.subject import Network, read, tensors

    call = given.calls()[0]
    model = Network(read(given.model, given.network), given.network)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(tensors(call)), file, input_names=list(call), output_names=["out"],
            opset_version=OPSET, dynamo=True, external_data=True, verbose=False,
        )  # fmt: skip


def load(given: Given) -> Callable[[Any], NDArray[Any]]:
    return session(given.own / GRAPH, given.threads)


def session(file: Path, threads: int) -> Callable[[Any], NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    made = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    kinds = {one.name: one.type for one in made.get_inputs()}

    def run(arrays: Any) -> NDArray[Any]:
        given = {
            name: arrays[name].astype("float32") if kind == "tensor(float)" else arrays[name]
            for name, kind in kinds.items()
        }
        out: NDArray[Any] = made.run(None, given)[0]
        return out

    return run
