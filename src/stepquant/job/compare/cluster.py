"""Tasks on a Ray cluster. Nothing but bytes goes over the network: folders out, files back; no disk need be shared.

Ray itself runs a task again whose worker or node has died; what it finds out about the machine is no part of a result.
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.util
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch

from stepquant.calib.cache import atomically
from stepquant.errors import StepquantError
from stepquant.job.compare.executor import Finished, failed
from stepquant.job.compare.store import ARTIFACT, WORK, take_lock
from stepquant.job.compare.tasks import Quantize, Task, read_task
from stepquant.job.recipe import IN_FULL
from stepquant.progress import Silent

Files = Mapping[str, bytes]
LOADED = (
    "model",
    "artifact",
    "inception",
    "lpips",
    "clip",
    "data",
)  # what a worker keeps: it loads them once
NOT_SHIPPED = (".lock", "log.txt", WORK)
ALONE = "."
RETRIES = 5  # of a task whose node dies
SECONDS_TO_CONNECT = 5.0
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4
SETTINGS = b"\x04"
EMPTY_SETTINGS = b"\x00\x00\x00" + SETTINGS + b"\x00" * 5


class Cluster:
    """One task a core of the cluster, or `workers` at once; each with `threads` threads."""

    def __init__(self, address: str | None = None, workers: int | None = None, threads: int = 1) -> None:
        self.ray, self.threads = connect(address), threads
        cores = [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        if threads > max(cores, default=0):
            self.ray.shutdown()
            raise StepquantError(
                "no node of the cluster has that many cores",
                got=f"{threads} threads a task",
                expected=f"at most {max(cores, default=0)}",
                fix="give fewer --threads",
            )
        self.slots = max(workers or sum(count // threads for count in cores), 1)
        again = {"max_retries": RETRIES, "num_cpus": threads}
        # A fresh process for each quantization: its peak of memory is a result.
        self.once = self.ray.remote(**again, max_calls=1)(perform_here)
        self.often = self.ray.remote(**again)(perform_here)
        self.running: dict[Any, Task] = {}
        self.shipped: dict[Path, Any] = {}

    def start(self, task: Task) -> None:
        remote = self.once if isinstance(task, Quantize) else self.often
        sent = [self.ship(path, keep=name in LOADED) for name, path in task.reads.items()]
        places = [(name, path.resolve().name) for name, path in task.reads.items()]
        self.running[remote.remote(task.model_dump_json(context=IN_FULL), places, self.threads, *sent)] = task

    def ship(self, folder: Path, *, keep: bool) -> Any:
        """A folder or file in the cluster's memory; models, artifacts and weights are put there once."""
        if folder in self.shipped:
            return self.shipped[folder]
        sent = self.ray.put(pack(folder))
        if keep:
            self.shipped[folder] = sent
        return sent

    def wait(self) -> Finished:
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        task = self.running.pop(done[0])
        try:
            files, error, kind = self.ray.get(done[0])
        except self.ray.exceptions.RayError as lost:
            return Finished(task, f"the cluster lost it: {str(lost).splitlines()[0]}", "Died", died=True)
        unpack(files, task.out)
        return Finished(task, error, kind)

    def close(self) -> None:
        for running in self.running:
            self.ray.cancel(running, force=True)
        self.running.clear()
        self.shipped.clear()
        self.ray.shutdown()


def connect(address: str | None) -> Any:
    """The library, connected to that cluster or to one that begins here; an address where nothing answers is an error."""
    if importlib.util.find_spec("ray") is None:
        raise StepquantError("this needs Ray, which is not installed", fix="pip install 'stepquant[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if address not in (None, "auto", "local"):
        check_reachable(str(address))
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address or "local", ignore_reinit_error=True, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise unreachable(str(address), words) from error
    return ray


def check_reachable(address: str) -> None:
    """Ray itself would try for minutes. Its ports speak HTTP/2, whose two sides begin with a frame of settings."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if not host:
            raise ValueError("no port in it")
        with socket.create_connection((host, int(port)), SECONDS_TO_CONNECT) as connection:
            connection.sendall(HTTP2_PREFACE + EMPTY_SETTINGS)
            if connection.recv(9)[3:4] != SETTINGS:
                raise ValueError("something else answers there")
    except (OSError, ValueError) as error:
        raise unreachable(address, str(error)) from error


def unreachable(address: str, words: str) -> StepquantError:
    return StepquantError(
        f"there is no Ray cluster at '{address}'",
        got=words,
        expected="HOST:PORT of its head node, as `ray start --head` prints it",
        fix="start one there, or leave --address out to begin one on this machine",
    )


def perform_here(
    text: str, places: list[tuple[str, str]], threads: int, *folders: Files
) -> tuple[Files, str, str]:
    """On a worker: unpack, perform, and return the files that were made; an error of the task as words."""
    torch.set_num_threads(threads)
    task = read_task(text)
    with tempfile.TemporaryDirectory(prefix="stepquant-") as scratch, ExitStack() as locks:
        reads = {
            name: (kept(called, files) if name in LOADED else unpack(files, Path(scratch) / name / called))
            for (name, called), files in zip(places, folders)
        }
        out = Path(scratch) / "out" / task.out.name
        out.mkdir(parents=True)
        lasting = Path(tempfile.gettempdir()) / f"stepquant-{getpass.getuser()}" / task.out.name
        if isinstance(task, Quantize) and (lock := take_lock(lasting)) is not None:
            locks.callback(lock.release)
            out = lasting  # what is fitted stays on this node, should the process die
        try:
            task.model_copy(update={"reads": reads, "out": out}).perform(Silent())
        except Exception as error:  # the border of the process
            found = failed(task, error)
            return pack(out), found.error, found.kind
        files = pack(out)
        shutil.rmtree(out)
        return files, "", ""


@lru_cache
def worker_folder() -> Path:
    """What this worker keeps while it lives."""
    return Path(tempfile.mkdtemp(prefix="stepquant-worker-"))


def kept(called: str, files: Files) -> Path:
    """A folder or file by its content: the same one is the same path, so that it is loaded once."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"|{name}|".encode() + hashlib.sha256(files[name]).digest())
    folder = worker_folder() / total.hexdigest()[:16] / called
    if not folder.exists():
        part = folder.with_name(f"{called}.part")
        shutil.rmtree(part, ignore_errors=True)
        unpack(files, part).rename(folder)
    return folder


def pack(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of the files in a folder; a single file is ALONE."""
    if folder.is_file():
        return {ALONE: folder.read_bytes()}
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    named = ((file.relative_to(folder), file) for file in files)
    return {str(name): file.read_bytes() for name, file in named if name.parts[0] not in NOT_SHIPPED}


def unpack(files: Files, folder: Path) -> Path:
    """The folder with these files, those that say that the others are finished last; or the one file."""
    if set(files) == {ALONE}:
        atomically(folder, methodcaller("write_bytes", files[ALONE]))
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if any(name.startswith(f"{ARTIFACT}/") for name in files):
        shutil.rmtree(folder / ARTIFACT, ignore_errors=True)
    for name in sorted(files, key=lambda name: (-name.count("/"), name)):
        atomically(folder / name, methodcaller("write_bytes", files[name]))
    return folder
