from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics import reference
from stepquant.evaluate.metrics.frechet import frechet, merge
from stepquant.evaluate.metrics.reference import read_data
from stepquant.evaluate.networks.reader import Extractor, View


class Small:
    """A reader with the names of the large one, and narrow features."""

    digest, resize = "small", "TF1 bilinear to 299"
    views = (View("FID", "KID", " (Inception)"), View("sFID"), View("IS", classes=True))

    def read(self, images: Tensor) -> dict[str, Tensor]:
        rows = images.flatten(1)
        return {"FID": rows[:, :4], "sFID": rows[:, 4:7], "IS": rows[:, :5]}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MOMENTS", {"FID": ("mu", "sigma", 4), "sFID": ("mu_s", "sigma_s", 3)})


def save_images(folder: Path, count: int, size: int = 8) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return pixels


@pytest.mark.usefixtures("narrow")
def test_a_file_of_moments_stands_for_the_images_it_was_made_of(tmp_path: Path) -> None:
    pixels = save_images(tmp_path, 30)
    rows = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1).double().numpy() / 255
    parts = {"": rows[:, :4], "_s": rows[:, 4:7]}
    arrays = {f"mu{k}": x.mean(0) for k, x in parts.items()} | {
        f"sigma{k}": np.cov(x, rowvar=False) for k, x in parts.items()
    }
    np.savez(tmp_path / "stats.npz", **arrays)
    read, known = read_data(str(tmp_path), Small()), read_data(str(tmp_path / "stats.npz"), Small())
    assert set(read) == set(known) == {"FID", "sFID"}
    for name in read:
        seen, stood = merge(read[name].blocks), merge(known[name].blocks)
        assert frechet(seen, stood) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(seen.covariance, stood.covariance)
    assert read["FID"].features is not None
    assert read["sFID"].features is None  # no neighbours are looked for among these
    assert known["FID"].features is None


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "holds no statistics"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "not the mean and covariance"),
        ({"mu": np.zeros(4)}, "not the mean and covariance"),
        ({"mu": np.array([{"a": 1}], dtype=object), "sigma": np.eye(4)}, "cannot read the statistics"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "not finite"),
        ({"mu": np.zeros(4), "sigma": np.diag([1, 1, 1, np.inf])}, "not finite"),
        ({"mu": np.zeros(4, complex), "sigma": np.eye(4)}, "cannot read the statistics"),
        ({"mu": np.array(["a"] * 4), "sigma": np.eye(4)}, "cannot read the statistics"),
        (None, "cannot read the statistics"),
    ],
)
def test_wrong_statistics_are_one_clear_error(
    tmp_path: Path, arrays: dict[str, np.ndarray] | None, message: str
) -> None:
    file = tmp_path / "stats.npz"
    if arrays is None:
        file.write_bytes(b"PK\x03\x04 not a zip file")
    else:
        np.savez(file, **arrays)
    with pytest.raises(EvaluationError, match=message) as error:
        read_data(str(file), Small())
    assert str(file) in str(error.value)


def test_moments_say_nothing_about_other_networks(extractor: Extractor, tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert read_data(str(tmp_path / "stats.npz"), extractor) == {}
    assert read_data("cifar10", Small()) == {}  # the shipped statistics are those of the embedded network


def test_data_of_another_size_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path, 3)
    assert set(read_data(str(tmp_path), Small(), (8, 8))) == {"FID", "sFID"}
    with pytest.raises(EvaluationError, match="another size") as error:
        read_data(str(tmp_path), Small(), (16, 12))
    assert "8x8" in str(error.value)
    assert "12x16" in str(error.value)


def test_one_array_under_the_name_of_statistics(tmp_path: Path) -> None:
    file = tmp_path / "array.npz"
    with file.open("wb") as stream:
        np.save(stream, np.zeros(4))
    with pytest.raises(EvaluationError, match="cannot read the statistics"):
        read_data(str(file), Small())


def test_an_image_too_large_to_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path, 1, size=64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(EvaluationError, match="cannot read the image"):
        list(reference.folder_images(tmp_path))


def test_the_first_images_of_a_folder_are_of_all_its_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog", "horse", "ship"):
        (tmp_path / name).mkdir()
        save_images(tmp_path / name, 50)
    files = reference.image_files(tmp_path)
    assert len(files) == len(set(files)) == 200
    shares = Counter(file.parent.name for file in files[:80])
    assert len(shares) == 4
    assert min(shares.values()) >= 10
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert [file.relative_to(moved) for file in reference.image_files(moved)] == [
        file.relative_to(tmp_path) for file in files
    ]


def test_the_digest_of_a_folder_tells_other_pixels_of_the_same_size(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png", compress_level=0)
    before = reference.data_digest(str(tmp_path))
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(tmp_path / "a.png", compress_level=0)
    assert reference.data_digest(str(tmp_path)) != before
