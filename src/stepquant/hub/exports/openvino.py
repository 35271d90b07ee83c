"""OpenVINO's own files, .xml and .bin, converted from an ONNX graph; weights stay bytes in them.

Convolutions stay what they are in that graph: OpenVINO multiplies them in integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepquant.hub.exports import onnx
from stepquant.hub.exports.at_rest import Network
from stepquant.hub.exports.outlook import Outlook
from stepquant.progress import Progress

ENDS = ".xml"
NEEDED = (*onnx.NEEDED, "openvino")


def outlook(network: Network, arguments: Mapping[str, Any]) -> Outlook:
    return onnx.outlook(network, arguments, windows=False)


def check_installed() -> None:
    onnx.check_installed(NEEDED)


def write(
    network: Network, seen: Outlook, file: Path, progress: Progress, arguments: Mapping[str, Any]
) -> None:
    import openvino

    graph = file.with_suffix(onnx.ENDS)
    onnx.write(network, seen, graph, progress, arguments, windows=False)
    for _ in progress.track(("converting",), "converting", 1):
        openvino.save_model(openvino.convert_model(graph), file, compress_to_fp16=False)
    for one in file.parent.glob(f"{graph.name}*"):
        one.unlink()
