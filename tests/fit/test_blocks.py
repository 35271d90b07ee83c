from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepquant.core.pack import unpack
from stepquant.errors import CalibrationError
from stepquant.fit.blocks import hold_out, reconstruct_blocks
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Schedule
from stepquant.progress import Silent
from stepquant.quant.freeze import packed_tensors
from tests.fit.conftest import Bench

pytestmark = pytest.mark.usefixtures("coarse")

QUICK = Schedule(iterations=8, batch=8, rounding_rate=0.1, penalty=0.1)


class Killed(Exception):  # noqa: N818 - it stands for a signal
    pass


class Killer(Silent):
    """Ends the run after some blocks."""

    def __init__(self, after: int) -> None:
        self.left = after

    def note(self, words: str) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


def run(
    bench: Bench, cache: Path, settings: dict[str, int] | None = None, progress: Silent | None = None
) -> dict:
    for layer in bench.network.layers.values():
        layer.rounding = None
    journal = Journal(cache, bench.network, bench.data, settings or {})
    reports = reconstruct_blocks(
        bench.streams, QUICK, journal, stage="weights", activations=False, held=0.25, progress=progress
    )
    assert [report.path for report in reports] == [piece.path for piece in bench.streams.pieces]
    return dict(weights(bench))


def weights(bench: Bench) -> dict[str, torch.Tensor]:
    return {path: layer.weight_integers().clone() for path, layer in bench.network.layers.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[path]) for path, value in first.items())


def test_a_killed_run_goes_on_and_yields_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    whole = run(bench, tmp_path / "whole")
    with pytest.raises(Killed):
        run(bench, tmp_path / "killed", progress=Killer(after=6))
    files = sorted((tmp_path / "killed").rglob("*.safetensors"))
    assert len(files) == 6
    times = [file.stat().st_mtime_ns for file in files]
    assert same(run(bench, tmp_path / "killed"), whole)
    assert [file.stat().st_mtime_ns for file in files] == times, "finished blocks are not learnt again"


def test_other_settings_are_another_journal(bench: Bench, tmp_path: Path) -> None:
    first = Journal(tmp_path, bench.network, bench.data, {"rate": 1})
    second = Journal(tmp_path, bench.network, bench.data, {"rate": 2})
    third = Journal(tmp_path, bench.network, bench.data.subset(range(5)), {"rate": 1})
    assert len({first.folder, second.folder, third.folder}) == 3


def test_a_damaged_journal_is_one_clear_error(bench: Bench, tmp_path: Path) -> None:
    run(bench, tmp_path)
    file = next(tmp_path.rglob("conv_in.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CalibrationError, match="journal of an earlier run is damaged") as caught:
        run(bench, tmp_path)
    assert "conv_in" in str(caught.value)


def test_parameters_keep_their_gradient_flags(bench: Bench, tmp_path: Path) -> None:
    model = bench.network.denoiser.model
    model.conv_in.layer.bias.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    run(bench, tmp_path)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_learnt_is_frozen(bench: Bench, tmp_path: Path) -> None:
    bench.network.switch(weights=True, inputs=False)
    nearest = weights(bench)
    learnt = run(bench, tmp_path)
    assert not same(nearest, learnt)
    for path, layer in bench.network.layers.items():
        layer.input_quantizer = None
        grid = layer.weight_quantizer.grid
        stored = packed_tensors(layer)["weight"]
        assert torch.equal(unpack(stored, grid, layer.weight.numel()).float(), learnt[path].reshape(-1))


def test_one_record_cannot_be_held_out() -> None:
    with pytest.raises(CalibrationError, match="too few"):
        hold_out(1, 0.5)
