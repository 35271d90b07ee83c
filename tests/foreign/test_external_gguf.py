"""The same files by the gguf package, where it is installed: what it wrote, and what it says that blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepquant.hub.foreign.blocks import BLOCKS
from stepquant.hub.foreign.read import read

gguf: Any = pytest.importorskip("gguf", reason="the outside reference is the gguf package")

WRITES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # to the others it only reads


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A file of every type, and its tensors by the package; blocks that it cannot make are bytes with finite scales."""
    rng, want = np.random.default_rng(0), {}
    path = tmp_path_factory.mktemp("gguf") / "some.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_quantization_version(2)
    for number, block in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        data = rng.integers(0, 256, (8, 2 * block.bytes), dtype=np.uint8)
        if block.name in WRITES:
            data = gguf.quantize(rng.standard_normal((8, 2 * block.numbers), dtype=np.float32), kind)
        else:
            for at in range(1, data.shape[1], 2):  # wherever the 16 bits of a scale lie, they are no infinity
                data[:, at] &= 0xBB if at % block.bytes in (81, 83, 109, 209, 1, 3) else 0xFF
        writer.add_tensor(f"{block.name}.weight", data, raw_dtype=kind)
        want[block.name] = gguf.dequantize(data, kind)
    for name, values in (("half", np.float16), ("single", np.float32)):
        want[name] = rng.standard_normal((3, 5)).astype(values)
        writer.add_tensor(name, want[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, want


def test_external_files_are_read(written: tuple[Path, dict[str, Any]]) -> None:
    path, want = written
    found = read(path)
    assert found.dialect == "flux"
    assert set(found.layers) | set(found.floats) == set(want)
    for name in found.floats:
        assert torch.equal(found.file.read(name), torch.from_numpy(want[name]))


@pytest.mark.parametrize("name", [block.name for block in BLOCKS.values()])
def test_external_numbers_are_the_same_bit_for_bit(name: str, written: tuple[Path, dict[str, Any]]) -> None:
    path, want = written
    found = read(path)
    layer = found.layers[name]
    numbers = torch.from_numpy(want[name])
    assert numbers.isfinite().all()
    assert torch.equal(layer.rows(found.file).floats(), numbers)
    assert torch.equal(layer.floats(found.file), numbers)


def test_external_sizes_of_blocks() -> None:
    assert {number: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] for number in BLOCKS} == {
        number: (block.numbers, block.bytes) for number, block in BLOCKS.items()
    }
