"""OpenVINO: float, static INT8 of NNCF, and the hybrid mode of optimum-intel; shapes are fixed."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.given import Given

INPUTS = "inputs"  # names of the arrays, in the order of the graph


def prepare(given: Given, mode: str) -> None:
    given.own.mkdir(parents=True)
    made = given.own / "float.xml"
    convert(given, made)
    gc.collect()
    if mode != "float":
        made = quantized(given, made, mode)
    (given.own / INPUTS).write_text("\n".join(given.calls()[0]))


def convert(given: Given, file: Path) -> None:
    import openvino
    import torch

    from benchmarks.engines.subject import Network, read, tensors

    call = given.calls()[0]
    options = {"attn_implementation": "eager"} if given.network == "text_encoder" else {}
    model = Network(read(given.model, given.network, **options), given.network)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(
            model, example_input=tuple(tensors(call)), input=[list(value.shape) for value in call.values()]
        )
    openvino.save_model(graph, file, compress_to_fp16=False)


def quantized(given: Given, file: Path, mode: str) -> Path:
    """The graph that the mode makes, instead of the float one."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    graph = openvino.Core().read_model(file)
    data = nncf.Dataset([list(call.values()) for call in given.calls()])
    graph = {"int8": static, "hybrid": hybrid}[mode](graph, data, given)
    made = given.own / f"{mode}.xml"
    openvino.save_model(graph, made, compress_to_fp16=False)
    del graph
    for one in given.own.glob("float.*"):
        one.unlink()
    return made


def static(graph: Any, data: Any, given: Given) -> Any:
    import nncf

    return nncf.quantize(graph, data, subset_size=len(given.calls()))


def hybrid(graph: Any, data: Any, given: Given) -> Any:
    """As optimum-intel does it: weights of linears and embeddings alone, and all else of the denoiser with its
    activations; other networks by their weights."""
    import nncf

    if given.network != "unet":
        return nncf.compress_weights(graph)
    linears = [
        one.get_friendly_name()
        for one in graph.get_ops()
        if one.get_type_name() == "MatMul" and of_weights(one)
    ]
    graph = nncf.compress_weights(graph, ignored_scope=nncf.IgnoredScope(types=["Convolution"]))
    return nncf.quantize(
        graph,
        data,
        subset_size=len(given.calls()),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=linears),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        ),
    )


def of_weights(product: Any) -> bool:
    """Whether one of its factors is a constant, maybe behind a conversion or a transposition."""

    def constant(node: Any) -> bool:
        kind = node.get_type_name()
        if kind in ("Convert", "Transpose", "Reshape", "Multiply", "Subtract"):
            return constant(node.input_value(0).get_node())
        return bool(kind == "Constant")

    return any(constant(product.input_value(port).get_node()) for port in (0, 1))


def load(given: Given, mode: str) -> Callable[[Any], NDArray[Any]]:
    """Floats in the type that OpenVINO chooses on this machine."""
    graph, names = given.own / f"{mode}.xml", (given.own / INPUTS).read_text().split()
    return compiled(graph, names, given.threads)


def compiled(graph: Path, names: list[str], threads: int) -> Callable[[Any], NDArray[Any]]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()

    def run(arrays: Any) -> NDArray[Any]:
        out = request.infer([arrays[name] for name in names])
        return np.array(out[0])

    return run
