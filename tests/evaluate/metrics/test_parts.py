from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics import parts as module
from stepquant.evaluate.metrics.parts import Parts, read_parts

SIZE = 6
COUNTS = {"ground": 2, "body": 5, "badge": 6, "head": 4}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random parts of the kinds above: three of four pixels of a badge cover, of all but the ground about half."""
    generator = np.random.default_rng(seed)
    out = {}
    for name, count in COUNTS.items():
        pixels = generator.integers(0, 256, (count, SIZE, SIZE, 4), dtype=np.uint8)
        share = {"ground": 1.0, "badge": 0.75}.get(name, 0.5)
        pixels[..., 3] = 255 * (generator.random((count, SIZE, SIZE)) < share)
        out[name] = pixels
    return out


@pytest.fixture
def small(tmp_path: Path) -> Parts:
    np.savez(tmp_path / "parts.npz", **arrays())
    return read_parts(tmp_path / "parts.npz")


def draw(parts: Parts, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(len(kind.covers), (count,), generator=generator) for kind in parts.kinds], 1
    )


def test_composing_is_pasting(small: Parts) -> None:
    picked = draw(small, 3)
    for row, image in zip(picked, small.compose(picked)):
        canvas = np.zeros((SIZE, SIZE, 3), np.uint8)
        for part, pixels in zip(row, arrays().values()):
            covered = pixels[part, ..., 3] > 0
            canvas[covered] = pixels[part, ..., :3][covered]
        np.testing.assert_array_equal((image.permute(1, 2, 0) * 255).round().numpy(), canvas)


def test_composed_characters_are_found_exactly() -> None:
    parts = read_parts()
    assert [len(kind.covers) for kind in parts.kinds] == [2, 30, 143, 20, 23]
    picked = draw(parts, 40)
    images = parts.compose(picked)
    found = parts.nearest(images)
    assert torch.equal(found.errors, torch.zeros(40, 5, dtype=torch.float64))
    assert torch.equal(parts.compose(found.picked), images)
    # Some accessories hide the whole body, and heads hide some accessories.
    assert torch.equal(found.picked[:, [0, 3, 4]], picked[:, [0, 3, 4]])
    assert torch.equal(found.seen.sum(1), torch.full((40,), 32.0 * 32, dtype=torch.float64))


def test_neighbours_are_found_together() -> None:
    # One after the other, these end at another body under another accessory.
    parts = read_parts()
    picked = torch.tensor([[1, 3, 28, 5, 21], [1, 4, 92, 8, 18], [0, 0, 92, 5, 8]])
    assert torch.equal(parts.nearest(parts.compose(picked)).picked, picked)


@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_nothing_is_nearer_among_all_compositions(small: Parts, noise: float) -> None:
    generator = torch.Generator().manual_seed(1)
    images = small.compose(draw(small, 20, seed=2))
    images = (images + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    every = torch.tensor(list(itertools.product(*(range(count) for count in COUNTS.values()))))
    pictures = small.compose(every).double().flatten(1) * 255
    best = torch.cdist(images.double().flatten(1) * 255, pictures).square().min(1).values
    found = small.nearest(images)
    torch.testing.assert_close(found.errors.sum(1), best, rtol=1e-6, atol=1e-2)


def test_errors_are_counted_where_a_part_is_seen(small: Parts) -> None:
    picked = draw(small, 8, seed=3)
    images = small.compose(picked)
    top = small.kinds[-1].covers[picked[:, -1]].unflatten(1, (SIZE, SIZE))
    damaged = images + 0.01 * top[:, None]
    found = small.nearest(damaged.float())
    expected = 3 * (0.01 * 255) ** 2 * top.flatten(1).sum(1)
    torch.testing.assert_close(found.errors[:, -1], expected, rtol=1e-4, atol=1e-4)
    assert float(found.errors[:, :-1].abs().max()) < 1e-6


def test_pictures_in_any_number_of_pieces(small: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(7, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    whole = small.nearest(images)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert torch.equal(small.nearest(images).picked, whole.picked)


def test_bad_parts_are_one_clear_error(tmp_path: Path, small: Parts) -> None:
    file = tmp_path / "bad.npz"
    good = arrays()
    half = good["body"].copy()
    half[0, 0, 0, 3] = 100
    for change, words in (
        ({}, "holds no parts"),
        ({"ground": good["head"]}, "lets something through"),
        (good | {"body": half}, "alpha is 0 or 255"),
        (good | {"body": good["body"][:, :4]}, "another size"),
        (good | {"body": good["body"].astype(np.float32)}, "torch.float32"),
        (good | {"body": np.array([None, {}], dtype=object)}, "allow_pickle"),
    ):
        np.savez(file, **change)
        with pytest.raises(EvaluationError, match=words) as error:
            read_parts(file)
        assert str(file) in str(error.value)
    file.write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="cannot read the parts"):
        read_parts(file)
    with pytest.raises(EvaluationError, match="another size"):
        small.nearest(torch.zeros(1, 3, 8, 8))


def test_the_digest_tells_parts_apart(tmp_path: Path, small: Parts) -> None:
    kinds = arrays()
    ordered = {"ground": kinds["ground"], **dict(reversed([x for x in kinds.items() if x[0] != "ground"]))}
    np.savez(tmp_path / "other.npz", **ordered)
    assert read_parts(tmp_path / "other.npz").digest != small.digest
