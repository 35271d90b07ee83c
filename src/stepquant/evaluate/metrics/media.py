"""Numbers about pairs of videos (n, f, c, h, w) and of sounds (n, c, samples), and one picture to show of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.instruments import Instruments, Networks, fit
from stepquant.evaluate.metrics.pairs import MOST_DECIBELS, PAIR_METRICS, PairMetric, psnr

SOUNDS, IMAGES, VIDEOS = 3, 4, 5  # dimensions of each
MEDIA = {SOUNDS: "sounds", IMAGES: "images", VIDEOS: "videos"}
WINDOW = 512  # samples that one spectrum is taken over
QUIETEST = 1e-8  # of the loudest power: what lies 80 dB below it counts as silence


def fit_media(made: Tensor, networks: Networks, data: str | None, *, prompted: bool) -> Instruments:
    """The instruments for what was made; networks and data that look at images cannot measure the rest."""
    if made.ndim == IMAGES:
        height, width = made.shape[-2:]
        return fit(networks, (height, width), data, prompted=prompted)
    given = [name for name, network in vars(networks).items() if network is not None and name != "lpips"]
    given += [] if data is None else ["data"]
    given += ["lpips"] if made.ndim == SOUNDS and networks.lpips is not None else []
    if given:
        raise EvaluationError(
            f"only images can be measured with: {', '.join(given)}",
            got=MEDIA[made.ndim],
            fix="leave these options out",
        )
    if made.ndim == SOUNDS:
        return Instruments((), SOUND_METRICS, (), {}, ())
    extra = () if networks.lpips is None else (over_frames(networks.lpips.metric()),)
    return Instruments((), VIDEO_METRICS + extra, (), {}, ())


def over_frames(metric: PairMetric) -> PairMetric:
    """A metric of images as the mean over the frames of a video."""

    def measure(a: Tensor, b: Tensor) -> Tensor | None:
        values = metric.measure(a.flatten(0, 1), b.flatten(0, 1))
        return None if values is None else values.unflatten(0, a.shape[:2]).mean(1)

    note = (
        f"{metric.note.removeprefix('per image, ')}; mean over frames" if metric.note else "mean over frames"
    )
    return replace(metric, measure=measure, note=note)


def motion_psnr(a: Tensor, b: Tensor) -> Tensor | None:
    """PSNR of the differences between neighbouring frames: flicker lowers it, a shift of all frames does not."""
    if a.shape[1] < 2:
        return None
    return psnr(a.double().diff(dim=1), b.double().diff(dim=1))


def signal_to_noise(a: Tensor, b: Tensor) -> Tensor:
    """Power of the sound over the power of what changed in it, in decibels, 100 at most."""
    power = [x.double().square().flatten(1).mean(1) for x in (a, a.double() - b.double())]
    return (10 * (power[0] / power[1].clamp(min=1e-30)).clamp(min=1e-30).log10()).clamp(max=MOST_DECIBELS)


def spectral_distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square over frequencies of the difference between log spectra in decibels, mean over time."""
    floor = power_of(a).flatten(1).amax(1).clamp(min=1e-30) * QUIETEST
    levels = [10 * torch.maximum(power_of(x), floor.reshape(-1, 1, 1, 1)).log10() for x in (a, b)]
    return (levels[0] - levels[1]).square().mean(2).sqrt().flatten(1).mean(1)


def power_of(sounds: Tensor) -> Tensor:
    """Power spectra (n, channels, frequencies, times)."""
    length = min(WINDOW, sounds.shape[-1])
    window = torch.hann_window(length, dtype=torch.float64)
    found = torch.stft(
        sounds.double().flatten(0, 1), length, window=window, center=False, return_complex=True
    )
    return found.abs().square().unflatten(0, sounds.shape[:2])


def picture_of(sample: Tensor) -> Tensor:
    """A picture (3, h, w) in [0, 1]: an image itself, the middle frame of a video, the spectrogram of a sound."""
    picture: Callable[[Tensor], Tensor] = {2: spectrogram, 3: lambda x: x, 4: lambda x: x[len(x) // 2]}[
        sample.ndim
    ]
    shown = picture(sample)
    return shown if len(shown) == 3 else shown[:1].expand(3, -1, -1)


def spectrogram(sound: Tensor) -> Tensor:
    """Levels of the first channel, the loudest white and what is 80 dB softer black, low frequencies below."""
    power = power_of(sound[None])[0, :1]
    level = (power / power.max().clamp(min=1e-30)).clamp(min=QUIETEST).log10()
    return (1 + level / 8).flip(1).float()


VIDEO_METRICS = (
    *map(over_frames, PAIR_METRICS),
    PairMetric(
        "motion PSNR", motion_psnr, "higher", "dB", "of differences between frames", "there is one frame"
    ),
)
SOUND_METRICS = (
    PairMetric("SNR", signal_to_noise, "higher", "dB", "per sound, then the mean"),
    PairMetric("spectral distance", spectral_distance, "lower", "dB", "between log spectra, mean over time"),
)
