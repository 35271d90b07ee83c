"""Numbers about videos and sounds, against numbers by hand."""

from __future__ import annotations

import pytest
import torch

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.instruments import Networks
from stepquant.evaluate.metrics.media import (
    VIDEO_METRICS,
    fit_media,
    motion_psnr,
    picture_of,
    signal_to_noise,
    spectral_distance,
)
from stepquant.evaluate.metrics.pairs import psnr

NONE = Networks(None, None, None, None, None)
generator = torch.Generator().manual_seed(0)


def videos(frames: int = 4) -> torch.Tensor:
    return torch.rand(2, frames, 3, 12, 12, generator=generator)


def test_metrics_of_images_are_means_over_frames() -> None:
    a, b = videos(), videos()
    measured = {metric.name: metric.measure(a, b) for metric in VIDEO_METRICS}
    by_hand = torch.stack(
        [torch.stack([psnr(x[None], y[None])[0] for x, y in zip(*pair)]) for pair in zip(a, b)]
    )
    torch.testing.assert_close(measured["PSNR"], by_hand.mean(1))
    assert measured["SSIM"] is not None
    assert measured["SSIM"].shape == (2,)


def test_motion_sees_flicker_and_no_constant_shift() -> None:
    a = videos() / 2
    found = motion_psnr(a, a + 0.1)
    assert found is not None
    assert found.min() > 99
    flicker = a + 0.1 * torch.tensor([1.0, 0, 1, 0]).reshape(1, 4, 1, 1, 1)
    found = motion_psnr(a, flicker)
    assert found is not None
    torch.testing.assert_close(found, torch.full((2,), 20.0).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(psnr(a, a + 0.1), torch.full((2,), 20.0).double(), atol=1e-4, rtol=0)
    assert motion_psnr(a[:, :1], a[:, :1]) is None


def test_sounds_that_are_half_as_loud_are_six_decibels_away() -> None:
    sound = torch.randn(2, 2, 4000, generator=generator)
    assert torch.equal(spectral_distance(sound, sound), torch.zeros(2).double())
    torch.testing.assert_close(
        spectral_distance(sound, sound / 2), torch.full((2,), 6.0206).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        signal_to_noise(sound, sound / 2), torch.full((2,), 6.0206).double(), atol=1e-3, rtol=0
    )
    assert torch.equal(signal_to_noise(sound, sound), torch.full((2,), 100.0).double())
    silence = torch.zeros(1, 1, 600)
    assert torch.isfinite(spectral_distance(silence, silence)).all()
    assert torch.isfinite(signal_to_noise(silence, silence)).all()


def test_a_pure_tone_is_one_bright_row() -> None:
    tone = torch.sin(2 * torch.pi * 100 * torch.arange(8000) / 8000)[None]
    picture = picture_of(tone)
    assert picture.shape[0] == 3
    rows = picture[0].mean(1)
    assert int(rows.argmax()) == len(rows) - 1 - round(100 * 512 / 8000)
    video = videos()[0]
    assert torch.equal(picture_of(video), video[2])


def test_what_measures_images_alone_is_refused() -> None:
    with pytest.raises(EvaluationError, match="data"):
        fit_media(videos(), NONE, "folder", prompted=False)
    assert fit_media(videos(), NONE, None, prompted=False).metrics == VIDEO_METRICS
