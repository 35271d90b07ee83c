"""Where results are put: beside, behind links, into mount points, and never lost."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stepquant.calib.cache import atomically
from stepquant.errors import StepquantError
from stepquant.job.files import hold, is_taken, new_folder, remove_abandoned

REPLACE = os.replace


def fill(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_text("numbers")
    (folder / "model_index.json").write_text("{}")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_filled(folder: Path) -> bool:
    return (
        names(folder) == {"unet", "model_index.json"}
        and (folder / "unet" / "weights").read_text() == "numbers"
    )


def make(out: Path) -> None:
    with new_folder(out) as folder:
        fill(folder)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    former = os.umask(mask)
    try:
        yield
    finally:
        os.umask(former)


def test_a_mount_point_is_filled_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system lets nobody rename onto a mount point."""
    out = tmp_path / "volume"
    out.mkdir()
    (out / "lost+found").mkdir()

    def busy(source: Path, target: Path) -> None:
        if Path(target) == out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        REPLACE(source, target)

    monkeypatch.setattr("os.replace", busy)
    assert not is_taken(out)
    make(out)
    (out / "lost+found").rmdir()
    assert is_filled(out)
    assert names(tmp_path) == {"volume"}


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "real")
    make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert is_filled(tmp_path / "elsewhere" / "real")
    assert names(tmp_path / "elsewhere") == {"real"}


def test_a_link_to_nothing_makes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "real")
    make(tmp_path / "out")
    assert is_filled(tmp_path / "elsewhere" / "real")


def test_a_link_to_itself_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(StepquantError, match="in the way"), new_folder(tmp_path / "out"):
        pytest.fail("the work began")


def test_what_is_finished_is_kept_when_its_place_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rival(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out":
            (tmp_path / "out" / "other").mkdir(parents=True)
        REPLACE(source, target)

    monkeypatch.setattr("os.replace", rival)
    with pytest.raises(StepquantError, match="another run has written there meanwhile") as caught:
        make(tmp_path / "out")
    (kept,) = tmp_path.glob(".out.*.finished")
    assert str(kept) in str(caught.value)
    assert is_filled(kept)


def test_an_interrupted_move_is_finished_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def fail_at_last(source: Path, target: Path) -> None:
        if Path(target) == out / "model_index.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        REPLACE(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail_at_last)
        with pytest.raises(StepquantError, match="Input/output error"):
            make(out)
    assert "model_index.json" not in names(out)
    assert is_taken(out)
    assert is_filled(out)


def test_another_run_into_the_same_folder_is_told_to_wait(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "out", tmp_path / "there"):
        with new_folder(out) as folder:
            assert not is_taken(out)
            with pytest.raises(StepquantError, match="another run is writing") as caught, new_folder(out):
                pytest.fail("the work began")
            assert "--resume" in str(caught.value)
            fill(folder)
        assert is_filled(out)


def test_folders_of_killed_runs_are_removed_and_living_ones_kept(tmp_path: Path) -> None:
    """Even one of this very number: in a container it comes again and again."""
    dead, living = tmp_path / f".out.{os.getpid()}.part", tmp_path / ".out.4194301.part"
    other = tmp_path / ".outer.4194301.part"
    for folder in (dead, living, other):
        folder.mkdir()
    lock = hold(living)
    assert lock is not None
    assert remove_abandoned(tmp_path / "out") == [living]
    assert names(tmp_path) == {living.name, other.name}
    os.close(lock)
    assert remove_abandoned(tmp_path / "out") == []
    assert names(tmp_path) == {other.name}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path: Path, mask: int) -> None:
    def private(file: Path) -> None:
        file.unlink(missing_ok=True)
        file.write_text("")
        file.chmod(0o600)

    with umask(mask):
        with new_folder(tmp_path / "out") as folder:
            private(folder / "weights")
        atomically(tmp_path / "file", private)
    for file in (tmp_path / "out" / "weights", tmp_path / "file"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_a_pipe_is_written_to_and_a_link_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("pipe", "link"):
        atomically(tmp_path / name, lambda file: file.write_text("words"))
    assert os.read(reading, 100) == b"words"
    os.close(reading)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "words"


def test_names_that_read_as_patterns_are_only_names(tmp_path: Path) -> None:
    (tmp_path / ".a.4194301.part").write_text("of another file")
    atomically(tmp_path / "[abc]", lambda file: file.write_text("words"))
    assert names(tmp_path) == {".a.4194301.part", "[abc]"}
