"""The engines, a row each: what of them has eight bits, the file that runs them, and what they cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.engines.given import PICTURE

CASES = ("unet", "vae", PICTURE)
REFERENCE = "torch fp32"
BY = "benchmarks.engines.by."


@dataclass(frozen=True)
class Engine:
    name: str
    eight_bits: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)  # cases, and why they are

    @property
    def draws(self) -> bool:
        """Pictures, and nothing else: its networks are not to be called."""
        return set(CASES) - set(self.missing) == {PICTURE}


def without(cases: tuple[str, ...], why: str) -> dict[str, str]:
    return dict.fromkeys(cases, why)


ALL, STATIC = "weights, activations, attention", "weights, activations"
GRAPHS = without(("vae", PICTURE), "graphs are exported of what denoises alone")
PICTURES = without(("unet", "vae"), "it draws pictures, and its networks cannot be called")

ENGINES = (
    Engine(REFERENCE, "", BY + "eager", {"dtype": "float32"}),
    Engine("stepquant", ALL, BY + "stepquant"),
    Engine(
        "stepquant dynamic",
        "weights, rows of activations, attention",
        BY + "stepquant",
        {"scheme": "w8a8-dynamic"},
    ),
    Engine("torch bf16", "", BY + "eager", {"dtype": "bfloat16"}),
    Engine("torch fp32 compiled", "", BY + "eager", {"dtype": "float32", "compiled": True}),
    Engine("torch bf16 compiled", "", BY + "eager", {"dtype": "bfloat16", "compiled": True}),
    Engine("OpenVINO float", "", BY + "openvino", {"mode": "float"}),
    Engine("OpenVINO INT8", STATIC, BY + "openvino", {"mode": "int8"}),
    Engine("OpenVINO hybrid", "weights, inputs of convolutions", BY + "openvino", {"mode": "hybrid"}),
    Engine("export to OpenVINO", ALL, BY + "exported", {"to": "openvino"}, missing=GRAPHS),
    Engine("ONNX Runtime QDQ", STATIC, BY + "onnx"),
    Engine("export to ONNX Runtime", ALL, BY + "exported", {"to": "onnx"}, missing=GRAPHS),
    Engine("torchao PT2E", STATIC, BY + "torchao"),
    Engine("SDNQ", "weights, rows of activations", BY + "sdnq"),
    Engine("stable-diffusion.cpp", "weights of linears", BY + "sdcpp", {"wtype": "q8_0"}, missing=PICTURES),
)
