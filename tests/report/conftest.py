from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image


def png(value: int, size: int = 8) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 40, 200)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def number(name: str, against: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "against": against, "n": 64, "better": "lower"} | values


@pytest.fixture
def results() -> dict[str, Any]:
    """Results with something in every part."""
    timing = {"batch": 8, "milliseconds": 80.0, "low": 70.0, "high": 95.0}
    same = "float, same seeds"
    return {
        "format": 1,
        "float": {"name": "a/b<c>", "class": "UNet2DModel", "parameters": 10_100_000, "digest": "f00"},
        "quantized": {"name": "q", "method": "ptq4dm", "scheme": "w8a8", "digest": "d1", "recipe": {"seed": 0, "settings": {"p": 2.4}}},
        "sampling": {"sampler": "ddim", "steps": 3, "calls": 3, "seed": 0, "images": 64, "batch": 8, "size": [8, 8]},
        "environment": {"stepquant": "0.1.0", "threads": 2},
        "quality": [
            number("PSNR", same, value=31.25, low=30.0, high=32.0, unit="dB", floor=9.0, better="higher"),
            number("FD-C10", "CIFAR-10 test", value=12.5, low=12.0, high=13.1, reference=11.75, floor=11.9, extractor="abc123"),
            number("FID", same, n=0, unavailable="needs weights"),
        ],
        "steps": [
            {"step": i, "t": 900.0 - i, "relative": 0.01 * (i + 1), "cosine": 1.0, "own_relative": 0.02, "own_cosine": 1.0, "state_relative": 0.0}
            for i in range(3)
        ],
        "blocks": {"steps": [0, 2], "t": [900.0, 0.0], "rows": [{"path": "mid_block.resnets.0", "sqnr": [35.25, None]}]},
        "inputs": [
            {"path": "wide.conv", "limits": [-1.0, 2.5], "low": [-4.5, -1.0], "high": [2.0, 3.0], "clipped": [0.0125, 0.0]},
            {"path": "fits.conv", "limits": [-9.0, 9.0], "low": [-1.0, -1.0], "high": [1.0, 1.0], "clipped": [0.0, 0.0]},
        ],
        "times": {"t": [900.0, 500.0, 0.0], "nearest": [0, 0, 2], "rate": 1 / 3, "worst": 0.75, "shown": [0, 1, 2],
                  "cosine": [[0.999, 0.5, 0.1], [0.8, 0.75, 0.2], [0.1, 0.2, 1.0]]},
        "images": {"seeds": [1, 2], "float": [png(10), png(20)], "quantized": [png(12), png(20)]},
        "speed": {"threads": 2, "rounds": 9, "reference": "fp32 eager", "rows": [
            timing | {"name": "fp32 eager", "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0},
            {"batch": 8, "name": "bf16 compiled", "unavailable": "no compiler"},
            timing | {"name": "stepquant", "milliseconds": 10.0, "low": 9.0, "high": 12.0, "ratio": 8.0},
        ]},
        "making": {"seconds": 61.0, "peak_bytes": 900_000_000, "start_bytes": 500_000_000},
        "size": {"float_bytes": 40_000_000, "bytes": 10_400_000, "ratio": 0.26},
        "coverage": [
            {"path": "mid_block.conv", "role": "conv", "macs": 990, "weight": "int8/channel", "input": "uint8/tensor", "kernel": "convolution", "integer": True},
            {"path": "time", "role": "time", "macs": 10, "integer": False, "reason": "weight-only"},
        ],
        "cost": {"macs": 1000, "bops": 73600, "float_bops": 1024000, "bytes": 99, "rows": [
            {"weight": 8, "input": 8, "layers": 1, "macs": 990, "bops": 63360, "bytes": 90},
            {"weight": 32, "input": 32, "layers": 1, "macs": 10, "bops": 10240, "bytes": 9},
        ]},
        "plan": [{"path": "mid_block.conv", "role": "conv", "port": "weight", "grid": "int8/channel", "reason": "of the scheme"}],
    }  # fmt: skip
