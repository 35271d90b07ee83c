from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepquant.evaluate.networks.cache import CachedReader, images_digest
from stepquant.evaluate.networks.reader import Extractor


class Counting(nn.Module):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images.flatten(1)[:, :5] * 2


@pytest.fixture
def reader(tmp_path: Path) -> CachedReader:
    return CachedReader(Extractor("FD-C10", Counting(), "abc", 4), tmp_path)


def calls(reader: CachedReader) -> int:
    return reader.reader.net.calls  # type: ignore[attr-defined]


IMAGES = torch.arange(2 * 3 * 16).reshape(2, 3, 4, 4) / 255


def test_what_was_read_is_not_read_again(reader: CachedReader) -> None:
    first = reader.read(IMAGES)
    torch.testing.assert_close(first["FD-C10"], IMAGES.flatten(1)[:, :5] * 2)
    torch.testing.assert_close(reader.read(IMAGES + 1e-5), first)  # the same bytes
    assert calls(reader) == 1
    reader.read(IMAGES + 1 / 255)
    assert calls(reader) == 2
    assert (reader.digest, reader.resize, reader.views[0].name) == ("abc", "", "FD-C10")


def test_another_network_reads_for_itself(reader: CachedReader, tmp_path: Path) -> None:
    reader.read(IMAGES)
    other = CachedReader(Extractor("FD-C10", Counting(), "def", 4), tmp_path)
    other.read(IMAGES)
    assert calls(other) == 1


def test_shape_belongs_to_the_content() -> None:
    assert images_digest(IMAGES) != images_digest(IMAGES.reshape(1, 3, 8, 4))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_files_are_made_again(reader: CachedReader, damage: str) -> None:
    expected = reader.read(IMAGES)
    file = reader.file(IMAGES)
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 64
    file.write_bytes({"cut": content[:50], "flipped": content, "empty": b""}[damage])
    torch.testing.assert_close(reader.read(IMAGES), expected)
    assert calls(reader) == 2
    torch.testing.assert_close(reader.read(IMAGES), expected)
    assert calls(reader) == 2  # mended
    assert not list(file.parent.glob("*.part"))
