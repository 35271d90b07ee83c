"""Folders that appear whole or not at all, and what the system refuses, as one error."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from stepquant.errors import StepquantError
from stepquant.models.pipelines.index import INDEXES

MORE_SPACE = "free disk space, then run again with --resume: recorded trajectories are kept"
WHAT_TO_DO = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None), MORE_SPACE)
CARD = "README.md"  # the model card of a pipeline, which may come into its folder later
INSIDE = ".stepquant"  # how folders on their way are called inside of the one that they fill


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end; it is made at once, so that a bad place fails early.

    It stands beside `out` and takes its name. Where `out` is there already it stands inside and is emptied into it,
    because a mount point cannot be replaced. What is finished is never removed, even if it cannot get there.
    """
    target = Path(os.path.realpath(out))
    with writing(out):
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise NotADirectoryError(None, "a file of that name is in the way")
        check_name(target)
        if living := remove_abandoned(target):
            raise StepquantError(
                f"another run is writing to '{out}' now",
                where=str(living[0]),
                fix="wait until it has finished, then run this again with --resume",
            )
        folder = on_the_way(target, str(os.getpid()))
        folder.mkdir(parents=True)
        lock = hold(folder)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        follow_umask(folder)
        put_in_place(folder, target)
    finally:
        if lock is not None:
            os.close(lock)


def check_name(target: Path) -> None:
    try:
        target.name.encode()
    except UnicodeEncodeError:
        raise StepquantError(
            "the name of the folder is not UTF-8", got=ascii(target.name), fix="choose another --out"
        ) from None


def on_the_way(target: Path, number: str, state: str = "part") -> Path:
    """The folder that becomes `target`."""
    if target.is_dir():
        return target / f"{INSIDE}.{number}.{state}"
    return target.with_name(f".{target.name}.{number}.{state}")


def hold(folder: Path) -> int | None:
    """A lock that ends with this process; None where another one has it. Numbers of processes are not enough:
    containers that share a disk do not see each other's."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # this disk knows no locks
        return lock
    return lock


def remove_abandoned(target: Path) -> list[Path]:
    """Remove the folders of runs that were killed; returns those of living ones."""
    pattern = on_the_way(target, "*")
    name = pattern.name if target.is_dir() else f".{escape(target.name)}.*.part"
    living = []
    for folder in pattern.parent.glob(name):
        lock = hold(folder)
        if lock is None:
            living.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    return living


def follow_umask(folder: Path) -> None:
    """Some libraries write files for their owner alone, whatever the umask says."""
    new = folder / ".new"
    new.touch()
    mode = new.stat().st_mode
    new.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def put_in_place(folder: Path, target: Path) -> None:
    kept = folder.with_suffix(".finished")
    try:
        if folder.parent == target:
            os.replace(folder, kept)
            finish_move(target)
        else:
            os.replace(folder, target)
    except OSError as error:
        with suppress(OSError):
            os.replace(folder, kept)
        taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        raise StepquantError(
            "the result is finished, but cannot be put in its place: "
            + ("another run has written there meanwhile" if taken else str(error.strerror)),
            where=str(target),
            got=f"it is kept as '{kept if kept.exists() else folder}'",
            fix="move it to where you want it",
        ) from error


def finish_move(target: Path) -> None:
    """Empty what is finished inside of `target` into it, the file that makes it a pipeline last."""
    for kept in target.glob(f"{INSIDE}.*.finished"):
        for entry in sorted(kept.iterdir(), key=lambda entry: entry.name in INDEXES):
            os.replace(entry, target / entry.name)
        kept.rmdir()


def is_taken(out: Path) -> bool:
    """Whether `out` is a folder with something in it; a file is an error when the folder is made."""
    with writing(out):
        finish_move(out)
        return out.is_dir() and any(
            entry.name != "lost+found" and not entry.name.startswith(INSIDE) for entry in out.iterdir()
        )


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """What the system refuses while files are written, as one error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StepquantError(
            f"cannot write: {getattr(error, 'strerror', None) or error}",
            where=str(where),
            fix=WHAT_TO_DO.get(getattr(error, "errno", None), "choose another --out"),
        ) from error
