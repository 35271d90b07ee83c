"""Files of images, videos and sounds hold what was made."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant.errors import StepquantError
from stepquant.report.media import file_for, write_media


def test_a_video_is_a_moving_grid(tmp_path: Path) -> None:
    shades = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1, 1).expand(2, 3, 3, 96, 96)
    file = write_media([shades[:1], shades[1:]], tmp_path / "v.gif")
    with Image.open(file) as opened:
        assert (opened.n_frames, opened.size) == (3, (193, 96))
        seen = []
        for frame in range(3):
            opened.seek(frame)
            seen.append(int(np.asarray(opened.convert("RGB"))[5, 5, 0]))
    assert np.allclose(seen, (0, 128, 255), atol=3)
    write_media([shades], tmp_path / "v.png")
    with Image.open(tmp_path / "v.png") as sheet:
        assert sheet.size == (96 * 3 + 2, 96 * 2 + 1)


def test_sounds_come_one_after_the_other(tmp_path: Path) -> None:
    sounds = torch.stack([torch.full((2, 100), 0.5), torch.full((2, 100), -2.0)])
    file = write_media([sounds], tmp_path / "s.wav", rate=200)
    with wave.open(str(file)) as opened:
        assert (opened.getnchannels(), opened.getframerate(), opened.getnframes()) == (2, 200, 300)
        codes = np.frombuffer(opened.readframes(300), np.int16).reshape(300, 2)
    assert codes[0].tolist() == [8192, 8192], "the loudest of all is full scale"
    assert codes[150].tolist() == [0, 0]
    assert codes[299].tolist() == [-32767, -32767]


def test_the_name_suits_what_was_made() -> None:
    image, video, sound = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 1, 2)
    assert [str(file_for(made, None)) for made in (image, video, sound)] == [
        "grid.png",
        "grid.gif",
        "grid.wav",
    ]
    with pytest.raises(StepquantError, match="sounds cannot be written"):
        file_for(sound, Path("a.png"))
    with pytest.raises(StepquantError, match="images cannot be written"):
        file_for(image, Path("a.gif"))
