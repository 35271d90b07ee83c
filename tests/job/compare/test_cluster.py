"""A real Ray cluster of two nodes on this machine: the same bytes as here, though a node dies in the middle."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepquant.errors import StepquantError
from stepquant.job.compare import Cell, Inline, cluster, compare, tasks
from stepquant.job.compare.cluster import Cluster
from stepquant.job.compare.executor import Finished
from tests.job.compare.test_compare import numbers, weights

Cells = Callable[..., list[Cell]]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node of one core and a second one, which tests may kill."""
    pytest.importorskip("ray", reason="optional: pip install 'stepquant[ray]'")
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


def test_a_node_that_dies_takes_nothing_with_it(cells: Cells, tmp_path: Path, nodes: Any) -> None:
    class Killing(Cluster):
        """Kills the second node when the first task is done."""

        def wait(self) -> Finished:
            found = super().wait()
            others = [node for node in nodes.list_all_nodes() if node is not nodes.head_node]
            for node in others:
                nodes.remove_node(node, allow_graceful=False)
                killed.append(len(self.running))
            return found

    killed: list[int] = []
    grid = cells("minmax", images=7)
    executor = Killing(nodes.address)
    assert executor.slots == 2
    there = compare(grid, tmp_path / "there", executor=executor)
    here = compare(grid, tmp_path / "here", executor=Inline())
    assert len(killed) == 1
    assert (there.made, there.failed) == (1, 0)
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert numbers(there.results) == numbers(here.results)
    assert there.results[0]["making"]["peak_bytes"] > 1e7


def test_more_threads_than_any_node_has(nodes: Any) -> None:
    with pytest.raises(StepquantError, match="no node of the cluster"):
        Cluster(nodes.address, threads=2)


def test_an_address_where_something_else_answers() -> None:
    """A server that takes whatever comes and says good day."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(4096)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(StepquantError, match="something else answers"):
            cluster.check_reachable(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_quantization_that_was_killed_goes_on_where_it_was(
    cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    cell = cells()[0]
    task = tasks.Quantize(title="", recipe=cell.recipe, out=tmp_path / "artifact-1")
    places, model = [("model", "model")], cluster.pack(Path(cell.recipe.model))
    sent = task.model_copy(update={"reads": {"model": Path("model")}}).model_dump_json()
    seen: list[list[str]] = []
    quantize = tasks.quantize_pipeline

    def die(*arguments: Any, cache: Path, **options: Any) -> Any:
        seen.append(sorted(path.name for path in cache.glob("*")))
        made = quantize(*arguments, cache=cache, **options)
        if len(seen) == 1:
            raise KeyboardInterrupt  # as abruptly as it can be done in this process
        return made

    monkeypatch.setattr(tasks, "quantize_pipeline", die)
    with pytest.raises(KeyboardInterrupt):
        cluster.perform_here(sent, places, 1, model)
    files, error, _ = cluster.perform_here(sent, places, 1, model)
    assert not error
    assert "quantized.json" in files
    assert seen[0] == []
    assert seen[1] != []
    assert not list((tmp_path / "node").glob("stepquant-*/artifact-1/*"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "host:port"])
def test_an_address_where_nothing_answers(address: str) -> None:
    pytest.importorskip("ray", reason="optional: pip install 'stepquant[ray]'")
    with pytest.raises(StepquantError, match="no Ray cluster at"):
        Cluster(address)


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(StepquantError, match=r"stepquant\[ray\]"):
        Cluster()


def test_folders_survive_the_journey(tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "unet").mkdir(parents=True)
    (source / "unet" / "weights").write_bytes(bytes(range(256)))
    (source / "quantized.json").write_text("{}")
    (source / ".lock").write_text("")
    files = cluster.pack(source)
    assert sorted(files) == ["quantized.json", "unet/weights"]
    assert cluster.pack(cluster.unpack(files, tmp_path / "there")) == files
    place = cluster.kept("model", files)
    assert place.name == "model"
    assert cluster.kept("model", dict(files)) == place
    assert cluster.kept("model", files | {"quantized.json": b"[]"}) != place
