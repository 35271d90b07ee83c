"""The table of docs/performance.md, made from what `stepquant benchmark --json` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.table import main


def test_a_row_for_each_batch_and_nothing_where_nothing_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = {"low": 1.0, "high": 3.0, "ratio_low": 3.5, "ratio_high": 4.5}
    fp32 = {"name": "fp32 eager", "milliseconds": 20.72, "ratio": 1.0} | timed
    ours = {"name": "stepquant", "milliseconds": 5.2, "ratio": 3.987} | timed
    broken = {"name": "compiled", "unavailable": "no compiler"}
    rows = [{"batch": 1} | row for row in (fp32, broken, ours)] + [
        {"batch": 8} | fp32 | {"milliseconds": 63.1}
    ]
    file = tmp_path / "speed.json"
    file.write_text(
        json.dumps({"speed": {"threads": 2, "rounds": 5, "reference": "fp32 eager", "rows": rows}})
    )
    main(str(file))
    assert capsys.readouterr().out.splitlines() == [
        "| batch | fp32 eager ms | stepquant |",
        "| --- | --- | --- |",
        "| 1 | 20.7 | 3.99 (3.50 to 4.50) |",
        "| 8 | 63.1 |  |",
    ]
