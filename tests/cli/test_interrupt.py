"""Ctrl-C and kill -9 in the middle of each stage: nothing half-written, and --resume gives the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stepquant.cli import main
from stepquant.cli.interrupt import Interrupted, heeding, keeping

WORDS = ("--method", "minmax", "--steps", "12", "--samples", "128")
FIELDS = ("--set", "batch=8", "--set", "trajectories=128")  # recordings in many shards
# Methods that fit blocks, by the stage that they are killed in.
BLOCKS = {
    "steps": ("--method", "brecq", "--set", "step_iterations=3"),
    "joint": ("--method", "eda_dm", "--set", "chunk=2"),
}
FEW = ("--steps", "5", "--samples", "24", "--set", "trajectories=6", "--set", "iterations=3")
PATIENCE = 600.0  # seconds for a loaded machine


# Processes that have imported everything when they begin: only what is asked of them takes time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["diffusers.pipelines.ddim.pipeline_ddim", "stepquant.cli.app", "stepquant.job"])


def begin(words: Sequence[str], said: Path, environment: dict[str, str], limit: int | None) -> None:
    """The command line with everything that it says in a file."""
    os.environ |= environment
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background ignores them, and so do its children
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(list(words)))


class Run:
    """`stepquant quantize` in a process of its own."""

    def __init__(
        self, tiny: Path, place: Path, limit: int | None = None, chosen: Sequence[str] = (*WORDS, *FIELDS)
    ) -> None:
        self.cache, self.out = place / "cache", place / "out"
        self.said = place / "said.txt"
        place.mkdir()
        self.said.touch()
        words = ["quantize", str(tiny), *chosen, "--out", str(self.out)]
        environment = {"STEPQUANT_CACHE": str(self.cache)}
        self.process = FORKS.Process(target=begin, args=(words, self.said, environment, limit))
        self.process.start()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.is_alive(), f"it ended before the signal: {self.said.read_text()}"
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> int | None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.wait()

    def wait(self) -> int | None:
        self.process.join(PATIENCE)
        return self.process.exitcode

    def recording(self) -> bool:
        return len(list(self.cache.glob("*/*.safetensors"))) >= 2

    def fitting(self) -> bool:
        return "recording trajectories: done" in self.said.read_text()

    def has_fitted(self, stage: str) -> bool:
        return len(list(self.cache.glob(f"journal/*/{stage}/*.safetensors"))) >= 2

    def writing(self) -> bool:
        return self.out.exists() or bool(list(self.out.parent.glob(".out.*.part/unet/config.json")))

    def drawing(self) -> bool:
        return self.out.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def artifact(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in ("README.md", "samples.png")}


@pytest.fixture
def start(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run; none outlives its test."""
    runs: list[Run] = []

    def begin(*options: Any, **named: Any) -> Run:
        runs.append(Run(tiny, tmp_path / "place", *options, **named))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.join()


def quantize(
    tiny: Path, out: Path, *more: str, chosen: Sequence[str] = (*WORDS, *FIELDS)
) -> dict[str, bytes]:
    assert main(["quantize", str(tiny), *chosen, "--out", str(out), "--quiet", *more]) == 0
    return contents(out)


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run makes that nobody disturbs."""
    place = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPQUANT_CACHE", str(place / "cache"))
        return quantize(tiny, place / "out")


@pytest.mark.parametrize("stage", ["recording", "fitting", "writing", "drawing"])
def test_kill_and_resume(
    stage: str,
    start: Callable[..., Run],
    tiny: Path,
    uninterrupted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = start()
    run.wait_until(getattr(run, stage))
    assert run.send(signal.SIGKILL) == -signal.SIGKILL
    written = contents(run.out)  # the whole artifact or nothing: its card comes later
    assert written == {name: data for name, data in artifact(uninterrupted).items() if written}
    assert not written or stage in ("writing", "drawing")
    recorded = {file: file.stat().st_mtime_ns for file in run.cache.glob("*/*.safetensors")}
    assert recorded

    monkeypatch.setenv("STEPQUANT_CACHE", str(run.cache))
    assert quantize(tiny, run.out, "--resume") == uninterrupted
    assert {file: file.stat().st_mtime_ns for file in recorded} == recorded  # not recorded again
    assert not list(run.out.parent.glob(".out*"))


@pytest.mark.parametrize("stage", BLOCKS)
def test_kill_between_blocks_and_resume(
    stage: str, start: Callable[..., Run], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = (*BLOCKS[stage], *FEW)
    run = start(chosen=chosen)
    run.wait_until(lambda: run.has_fitted(stage))
    assert run.send(signal.SIGKILL) == -signal.SIGKILL
    fitted = {file: file.stat().st_mtime_ns for file in run.cache.glob("journal/**/*.safetensors")}

    monkeypatch.setenv("STEPQUANT_CACHE", str(run.cache))
    resumed = quantize(tiny, run.out, "--resume", chosen=chosen)
    assert {file: file.stat().st_mtime_ns for file in fitted} == fitted  # not fitted again
    monkeypatch.setenv("STEPQUANT_CACHE", str(tmp_path / "undisturbed"))
    assert resumed == quantize(tiny, tmp_path / "out", chosen=chosen)


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_until(run.recording)
    assert run.send(signal.SIGINT) == 130
    said = run.said.read_text()
    assert "Interrupted" in said
    assert str(run.cache) in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert not run.out.exists()
    assert not list(run.out.parent.glob(".out*"))


def test_ctrl_c_while_the_card_is_made_keeps_the_artifact(
    start: Callable[..., Run], uninterrupted: dict[str, bytes]
) -> None:
    run = start()
    run.wait_until(run.drawing)
    run.wait_until(lambda: f"wrote {run.out}" in run.said.read_text())
    assert run.send(signal.SIGINT) == 130
    assert f"stepquant card {run.out}" in run.said.read_text()
    assert contents(run.out) == artifact(uninterrupted)
    assert main(["card", str(run.out), "--quiet"]) == 0
    assert contents(run.out) == uninterrupted


def test_a_terminal_that_closes_leaves_no_more_behind_than_ctrl_c(start: Callable[..., Run]) -> None:
    run = start()
    run.wait_until(run.recording)
    assert run.send(signal.SIGHUP) == 129
    said = run.said.read_text()
    assert "Interrupted" in said
    assert "--resume" in said
    assert not list(run.out.parent.glob(".out*"))


def test_a_file_size_limit_is_one_clear_error(start: Callable[..., Run]) -> None:
    run = start(20_000)
    assert run.wait() == 2
    said = run.said.read_text()
    assert "cannot write" in said
    assert "Traceback" not in said
    assert not run.out.exists()
    assert not list(run.cache.rglob("*.part"))


def interrupt(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(PATIENCE)


@pytest.fixture(params=[(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def asking(request: pytest.FixtureRequest) -> Iterator[tuple[signal.Signals, int]]:
    """A signal that this process does not ignore, and the exit code that it asks for."""
    number, code = request.param
    former = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield number, code
    signal.signal(number, former)


def test_a_library_that_makes_an_error_of_a_signal_does_not_hide_it(
    asking: tuple[signal.Signals, int],
) -> None:
    """As reading weights does: a run that was ended meanwhile said that the file was damaged."""

    def read() -> None:
        try:
            interrupt(asking[0])
        except KeyboardInterrupt as stop:
            raise OSError(str(stop)) from None

    with heeding():
        with pytest.raises(Interrupted, match="all is kept") as stop, keeping("all is kept"):
            read()
        assert stop.value.code == asking[1]
    with pytest.raises(OSError, match="of its own"), keeping("all is kept"):
        raise OSError("of its own")


def test_a_signal_while_the_command_line_is_read(
    asking: tuple[signal.Signals, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stepquant.cli.app.check_values", lambda _: interrupt(asking[0]))
    assert main(["methods"]) == asking[1]
    assert "Interrupted: nothing had begun" in capsys.readouterr().err
