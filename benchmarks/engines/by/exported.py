"""What `stepquant export` writes of the artifact, in the engines that it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from benchmarks.engines.given import Given

FILES = {"onnx": "graph.onnx", "openvino": "graph.xml"}
ARTIFACT = "stepquant"  # the engine whose folder it is made of


def prepare(given: Given, to: str) -> None:
    """Graphs are made of what denoises, in a call of its pipeline."""
    from stepquant import export

    given.own.mkdir(parents=True)
    with TemporaryDirectory(dir=given.folder) as folder:
        place = Path(folder)
        for one in (given.subject / "pipeline").iterdir():
            own = one.name == given.network
            (place / one.name).symlink_to(given.folder.with_name(ARTIFACT) / one.name if own else one)
        export(place, given.own / FILES[to], to=to, component=given.network)


def load(given: Given, to: str) -> Callable[[Any], NDArray[Any]]:
    file = given.own / FILES[to]
    if to == "onnx":
        from benchmarks.engines.by.onnx import session

        return session(file, given.threads)
    return of_openvino(given)


def of_openvino(given: Given) -> Callable[[Any], NDArray[Any]]:
    import numpy as np
    import openvino

    core = openvino.Core()
    graph, call = core.read_model(given.own / FILES["openvino"]), given.calls()[0]
    graph.reshape({one.get_any_name(): list(call[one.get_any_name()].shape) for one in graph.inputs})
    kinds = {one.get_any_name(): one.get_element_type().to_dtype() for one in graph.inputs}
    settings = {"INFERENCE_NUM_THREADS": given.threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def run(arrays: Any) -> NDArray[Any]:
        out = request.infer({name: arrays[name].astype(kind) for name, kind in kinds.items()})
        return np.array(out[0])

    return run
