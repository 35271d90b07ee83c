"""The same folders by SDNQ, where it is installed: it quantizes a network in a process of its own, and dequantizes it.

Nothing of it is imported here: its licence is another one.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from stepquant.job.foreign import convert

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sdnq") is None, reason="the outside reference is the sdnq package"
)

OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"weights_dtype": "int8", "group_size": -1},
    "int8 for products": {"weights_dtype": "int8", "group_size": -1, "use_quantized_matmul": True},
    "int8 for the tensor": {"weights_dtype": "int8", "group_size": -2},
    "uint8 in groups": {"weights_dtype": "uint8", "group_size": 32},
    "uint8 for products": {"weights_dtype": "uint8", "group_size": -1, "use_quantized_matmul": True},
    "uint4": {"weights_dtype": "uint4"},
    "int4": {"weights_dtype": "int4", "group_size": 32},
    "rotated": {"weights_dtype": "uint4", "use_hadamard": True, "hadamard_group_size": 64},
    "rotated for products": {
        "weights_dtype": "int8",
        "group_size": -1,
        "use_hadamard": True,
        "hadamard_group_size": 64,
        "use_quantized_matmul": True,
    },
    "with a branch": {"weights_dtype": "uint4", "use_svd": True, "svd_rank": 8},
    "with a branch, for products": {
        "weights_dtype": "int8",
        "group_size": -1,
        "use_svd": True,
        "svd_rank": 8,
        "use_quantized_matmul": True,
    },
    "of two types": {"weights_dtype": "uint4", "modules_dtype_dict": {"int8": ["to_q"]}},
}
BY_SDNQ = """
import sys, torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from sdnq import SDNQConfig
for name, options in {options!r}.items():
    config = SDNQConfig(**({{"use_quantized_matmul": False, "minimum_allowed_numel": 1024}} | options))
    model = FluxTransformer2DModel.from_pretrained("float", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(name)
    layers = {{path: one for path, one in model.named_modules() if hasattr(one, "sdnq_dequantizer")}}
    weights = {{path: one.dequantize().weight.detach() for path, one in layers.items()}}
    save_file({{path: value.float().contiguous() for path, value in weights.items()}}, name + "/dequantized.st")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdnq")
    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    ).save_pretrained(root / "float")
    subprocess.run([sys.executable, "-c", BY_SDNQ.format(options=OPTIONS)], cwd=root, check=True)
    return root


@pytest.mark.parametrize("name", OPTIONS)
def test_external_weights_stand_for_the_same_numbers(name: str, folders: Path, tmp_path: Path) -> None:
    made = convert(folders / name, tmp_path / "out")
    loaded: Any = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    integers = {path for path, one in loaded.named_modules() if not isinstance(one, nn.Linear)}
    want = load_file(folders / name / "dequantized.st")
    assert made.layers == len(want) > 10
    assert set(want) <= integers
    back = loaded.dequantize()
    exact = "rotated" not in name and "branch" not in name  # whose sides are kept in 16 bits
    for path, value in want.items():
        torch.testing.assert_close(
            back.get_submodule(path).weight, value, rtol=0, atol=1e-6 if exact else 2e-4
        )
