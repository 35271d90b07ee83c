"""What each site loses alone, against the model with that one weight exchanged by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from stepquant.calib.calibset import CalibSet
from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import fake_quantize, scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search
from stepquant.core.similarity import ssim
from stepquant.errors import EvaluationError
from stepquant.fit import alone
from stepquant.fit.alone import CANDIDATES, NORM, Noise, Question, Structure, losses_alone, sizes_of
from stepquant.fit.lines import Lines
from stepquant.models.denoiser import Denoiser
from stepquant.models.sampling import Sampling
from stepquant.progress import Silent
from stepquant.quant.insert import Place
from stepquant.quant.schemes import scheme

PLACES: tuple[Place, ...] = (("conv_in", "weight"), ("mid_block.attentions.0.to_q", "weight"))


@pytest.fixture
def data(source: Source) -> CalibSet:
    return source.record(every(2, (0, 9)))


def measured(denoiser: Denoiser, data: CalibSet, lines: Lines) -> dict[tuple[Place, int], float]:
    questions = [Question(place, (2, 4), Noise(denoiser, data)) for place in PLACES]
    return losses_alone(denoiser, scheme("w4a8"), questions, data, lines, Silent(), lambda _: None)


def test_losses_are_those_of_the_model_with_one_weight_exchanged(
    source: Source, data: CalibSet, tmp_path: Path
) -> None:
    denoiser = Denoiser.of(source.pipeline)
    arguments = data.take(range(len(data))).arguments
    with torch.no_grad():
        exact = denoiser.predict(arguments).double()
    found = measured(denoiser, data, Lines(tmp_path / "lines"))
    assert set(found) == {(place, bits) for place in PLACES for bits in (2, 4)}
    for (place, bits), loss in found.items():
        weight, grid = denoiser.model.get_submodule(place[0]).weight, Grid(bits, granularity="channel")
        kept, rows = weight.detach().clone(), weight.detach().flatten(1)
        scale, zero = scale_and_zero(*lp_search(rows, grid, p=NORM, candidates=CANDIDATES), grid)
        with torch.no_grad():
            weight.copy_(fake_quantize(rows, scale[:, None], zero[:, None], grid).view_as(weight))
            error = denoiser.predict(arguments).double() - exact
            weight.copy_(kept)
        ratios = [float(e.square().sum() / x.square().sum()) for e, x in zip(error, exact)]
        assert loss == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)


def test_what_is_known_is_not_measured_again(
    source: Source, data: CalibSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, lines = Denoiser.of(source.pipeline), Lines(tmp_path / "lines")
    first = measured(denoiser, data, lines)
    monkeypatch.setattr(alone, "set_ranges", None)
    assert measured(denoiser, data, lines) == first


def test_sizes_are_those_of_a_record(source: Source, data: CalibSet) -> None:
    denoiser = Denoiser.of(source.pipeline)
    places = [(path, port) for path in ("conv_in", "conv_out") for port in ("weight", "input")]
    assert sizes_of(denoiser, places, data) == dict(
        zip(places, (16 * 3 * 9, 3 * 8 * 8, 3 * 16 * 9, 16 * 8 * 8))
    )


def structure_of(pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Structure, SimpleNamespace]:
    drawn = SimpleNamespace(now=pictures)
    monkeypatch.setattr(alone, "run", lambda *_: drawn.now)
    return Structure(None, [0], Sampling(1)), drawn


def test_structure_is_that_of_pictures_and_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 16, 16)
    found, drawn = structure_of(pictures, monkeypatch)
    assert found.tells
    assert found() == 0
    drawn.now = (pictures + 0.1 * torch.randn_like(pictures)).clamp(0, 1)
    assert found() == pytest.approx(1 - float(ssim(pictures, drawn.now).mean()))
    film, _ = structure_of(pictures.expand(4, 2, 3, 16, 16), monkeypatch)
    assert film.pictures.shape == (8, 3, 16, 16)
    assert film.tells


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 500)])
def test_what_is_too_small_or_no_picture_tells_nothing(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not structure_of(torch.rand(shape), monkeypatch)[0].tells
    assert not structure_of(torch.zeros(2, 3, 16, 16), monkeypatch)[0].tells


def test_lines_that_cannot_be_written_are_an_error(source: Source, data: CalibSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="journal"):
        measured(Denoiser.of(source.pipeline), data, Lines(tmp_path / "file" / "lines"))
