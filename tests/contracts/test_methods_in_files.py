"""Every method on a network whose weights stay in files: the same bytes, and no second float of any weight in memory."""

from __future__ import annotations

import dataclasses
import gc
import sys
from pathlib import Path

import pytest
from torch import Tensor, nn

from stepquant import methods
from stepquant.core import freed, mapped
from stepquant.job.in_files import load_in_files
from stepquant.job.pipelines import load
from stepquant.progress import Silent
from stepquant.quant import freeze
from tests.contracts.smallest import digest, made, plan_for, smallest
from tests.contracts.test_methods_bytes import source_in, tiniest

pytestmark = [
    pytest.mark.usefixtures("coarse"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which memory is a file's"),
]
LARGE = 500  # elements: the convolutions of a network whose other weights are no larger than what else a method may keep


def in_memory(tensors: list[Tensor]) -> int:
    """Bytes of those that lie in no file; what shares memory counts once."""
    inside = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, *_, name = line.split(maxsplit=5)
        if ".safetensors" in name or "mapped-" in name:
            inside.append([int(end, 16) for end in ends.split("-")])
    own = {one.data_ptr(): one.nbytes for one in tensors}
    return sum(size for place, size in own.items() if not any(a <= place < b for a, b in inside))


def tensors() -> list[Tensor]:
    return [one for one in gc.get_objects() if issubclass(type(one), Tensor) and not one.is_meta]


def large(model: nn.Module) -> set[int]:
    return {value.numel() for value in model.parameters() if value.numel() > LARGE}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of all tensors in memory that are as large as a large weight, when a method begins to pack."""
    seen, packing, wanted = [], freed.trim, large(tiniest())
    others = {id(one) for one in tensors()}

    def look() -> None:
        seen.append(in_memory([one for one in tensors() if one.numel() in wanted and id(one) not in others]))
        packing()

    monkeypatch.setattr(freeze, "trim", look)
    return seen


def test_what_is_in_memory_is_seen(tmp_path: Path) -> None:
    weights = list(tiniest().parameters())
    assert in_memory(weights) == sum(one.nbytes for one in weights)
    assert in_memory([mapped.copied(one.detach(), tmp_path) for one in weights]) == 0


@pytest.mark.parametrize("name", methods.names())
def test_the_bytes_are_the_same_and_no_float_is_there_twice(
    name: str, taken: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "float"
    source_in(tmp_path).pipeline.save_pretrained(folder)
    usual = dataclasses.replace(source_in(tmp_path / "usual"), pipeline=load(folder))
    want = digest(made(smallest(name), plan_for(name), usual))
    taken.clear()
    gc.collect()  # integer networks hold themselves
    pipeline = load_in_files(str(folder), "cpu", Silent())
    source = dataclasses.replace(source_in(tmp_path / "filed"), pipeline=pipeline, memory=0)
    assert digest(made(smallest(name), plan_for(name), source)) == want
    assert taken == [0]
