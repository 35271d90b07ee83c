"""A run store as tables: what DuckDB and pandas read is what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stepquant.errors import StepquantError
from stepquant.job.compare import Cell, Inline, compare, query

Cells = Callable[..., list[Cell]]


@pytest.fixture
def store(cells: Cells, tmp_path: Path) -> Path:
    compare(cells("minmax", schemes=("w8a8", "w4a8")), tmp_path, executor=Inline())
    return tmp_path


@pytest.mark.parametrize(
    ("name", "against", "column"),
    [
        ("PSNR", "float, same seeds", "psnr_float"),
        ("FD-C10", "CIFAR-10 test", "fd_c10_data"),
        ("KD-C10", "float, other seeds", "kd_c10_others"),
        ("FD-CH", "characters test", "fd_ch_data"),
        ("recognised", "class asked for", "recognised_class"),
        ("truth", "legal images", "truth_legal"),
        ("CLIP score", "prompts", "clip_score_prompts"),
        ("IS", "classes of ImageNet", "is_classes"),
        ("precision (Inception)", "images in photos", "precision_inception_data"),
    ],
)
def test_columns_say_what_against_what(name: str, against: str, column: str) -> None:
    assert query.column_name(name, against) == column


def test_sql_over_a_store(store: Path) -> None:
    pytest.importorskip("duckdb", reason="optional: pip install 'stepquant[compare]'")
    columns, rows = query.ask(
        store, "select scheme, psnr_float, noise_error from results order by psnr_float"
    )
    assert columns == ["scheme", "psnr_float", "noise_error"]
    assert [row[0] for row in rows] == ["w4a8", "w8a8"]
    results = [json.loads(file.read_text()) for file in sorted(store.glob("cells/*/results.json"))]
    known = {
        r["quantized"]["scheme"]: next(q["value"] for q in r["quality"] if q["name"] == "PSNR")
        for r in results
    }
    assert {row[0]: row[1] for row in rows} == known
    _, joined = query.ask(
        store,
        "select scheme, avg(relative) from steps join results using (cell) group by scheme order by scheme",
    )
    assert [row[1] for row in joined] == pytest.approx([rows[0][2], rows[1][2]])
    _, numbers = query.ask(store, "select value from numbers where name = 'PSNR' order by value")
    assert [value for (value,) in numbers] == sorted(known.values())
    assert query.ask(store, None)[0][:3] == ["label", "scheme", "seed"]


def test_a_query_that_cannot_be_answered(store: Path) -> None:
    pytest.importorskip("duckdb", reason="optional: pip install 'stepquant[compare]'")
    with pytest.raises(StepquantError, match="cannot be answered"):
        query.ask(store, "select nothing_like_it from results")


def test_parquet_holds_the_same_rows(store: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="optional: pip install 'stepquant[compare]'")
    rows = parquet.read_table(store / "results.parquet").to_pylist()
    assert [(row["scheme"], row["state"], row["error"]) for row in rows] == [
        ("w8a8", "done", None),
        ("w4a8", "done", None),
    ]
    assert all(row["bytes"] < row["float_bytes"] and row["seconds"] > 0 for row in rows)


def test_waiting_and_failed_cells_have_rows(store: Path) -> None:
    first, second = sorted(store.glob("cells/*"))
    (first / "results.json").unlink()
    (second / "results.json").unlink()
    (second / "error.json").write_text('{"error": "no"}')
    (store / "cells" / "strange").mkdir()
    (store / "cells" / "strange" / "cell.json").write_text("{}")
    (store / "cells" / "stranger").mkdir()
    damaged = '{"label": "", "scheme": "", "recipe": {}, "evaluation": 3}'
    (store / "cells" / "stranger" / "cell.json").write_text(damaged)
    found = query.read_tables(query.Store.open(store)).results
    assert [(row["state"], row["error"]) for row in found] == [("waiting", None), ("failed", "no")]


def test_a_missing_library_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(query.importlib, "import_module", absent)
    with pytest.raises(StepquantError, match=r"stepquant\[compare\]"):
        query.ask(store, "select 1")


def test_no_store(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="optional: pip install 'stepquant[compare]'")
    with pytest.raises(StepquantError, match="there is no store of runs"):
        query.ask(tmp_path / "nowhere", "select 1")
