from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.ndimage import gaussian_filter
from torch import Tensor

from stepquant.evaluate.metrics.pairs import colour_shift, detail, over_exposure, psnr, ssim, structure_change


def images(count: int, seed: int, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def natural(count: int, seed: int) -> Tensor:
    """Noise with the spectrum of something seen."""
    blurred = gaussian_filter(images(count, seed).double().numpy(), sigma=1.0, axes=(-2, -1), mode="mirror")
    return torch.from_numpy((blurred - blurred.min()) / (blurred.max() - blurred.min()))


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al.: an 11-pixel Gaussian window of width 1.5, k1 = 0.01, k2 = 0.03, borders mirrored."""

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=1.5, truncate=5 / 1.5, mode="mirror", axes=(-2, -1))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    shared = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = (
        (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return float(value.mean())


def test_psnr_of_known_errors() -> None:
    a = images(3, 0) * 0.5
    assert psnr(a, a + 0.1).tolist() == pytest.approx([20.0] * 3, abs=1e-4)
    assert psnr(a, a).tolist() == [100.0] * 3


def test_ssim_equals_its_definition() -> None:
    a = images(2, 1)
    b = (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    found = ssim(a, b)
    assert found is not None
    expected = [ssim_by_hand(x, y) for x, y in zip(a.double().numpy(), b.double().numpy())]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(a[..., :10, :10], b[..., :10, :10]) is None


def test_colour_shift_is_the_length_of_the_shift_in_levels() -> None:
    a = images(2, 0) * 0.5
    shift = torch.tensor([3.0, 0.0, -4.0]).reshape(1, 3, 1, 1) / 255
    assert colour_shift(a, a + shift).tolist() == pytest.approx([5.0] * 2, rel=1e-4)
    assert colour_shift(a, a.flip(-1)).tolist() == pytest.approx([0.0] * 2, abs=1e-4)


def test_over_exposure_counts_newly_clipped_values() -> None:
    a = images(2, 1) * 0.5 + 0.25
    b = a.clone()
    b[0, :, :8] = 1.0
    b[1, 0, :4] = 0.0
    assert over_exposure(a, b).tolist() == pytest.approx([25.0, 100 / 3 / 8])
    assert over_exposure(b, a).tolist() == pytest.approx([-25.0, -100 / 3 / 8])


def test_structure_change_is_that_of_scipy_edges_and_blind_to_brightness() -> None:
    a, b = natural(2, 2), natural(2, 3)
    weights = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)

    def edges(x: np.ndarray) -> np.ndarray:
        grey = (x * weights).sum(0)
        return np.hypot(ndimage.sobel(grey, 0, mode="nearest"), ndimage.sobel(grey, 1, mode="nearest"))

    expected = [
        1 - np.corrcoef(edges(x).ravel(), edges(y).ravel())[0, 1] for x, y in zip(a.numpy(), b.numpy())
    ]
    assert structure_change(a, b).tolist() == pytest.approx(expected, rel=1e-6)
    assert structure_change(a, a * 0.5 + 0.2).tolist() == pytest.approx([0.0] * 2, abs=1e-9)


def test_detail_is_the_ratio_of_laplacian_energies() -> None:
    a = natural(2, 4)
    blurred = torch.from_numpy(gaussian_filter(a.numpy(), sigma=0.8, axes=(-2, -1), mode="mirror"))
    grey = [np.tensordot([0.299, 0.587, 0.114], x.numpy(), (0, 1)) for x in (a, blurred)]
    energies = [[(ndimage.laplace(image, mode="nearest") ** 2).mean() for image in x] for x in grey]
    expected = [after / before for before, after in zip(*energies)]
    assert detail(a, blurred).tolist() == pytest.approx(expected, rel=1e-6)
    assert max(expected) < 0.9
    assert detail(a, a * 0.5).tolist() == pytest.approx([0.25] * 2)
