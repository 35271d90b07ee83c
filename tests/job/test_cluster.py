"""A real Ray cluster of two nodes on this machine: the same bytes as here, though a node dies in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepquant.errors import StepquantError
from stepquant.job.compare import Cell, Inline, cluster, compare
from stepquant.job.compare.cluster import Cluster
from stepquant.job.compare.executor import Finished
from tests.job.test_compare import numbers, weights

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
