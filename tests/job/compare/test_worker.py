"""What a worker's process tells its parent."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from stepquant.job.compare import worker
from stepquant.job.compare.worker import Telling


def test_words_end_with_what_they_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_TICKS", -1)
    out = io.StringIO()
    telling = Telling(out)
    for item in telling.track(range(2), "fitting"):
        telling.note(f"block {item}")
    list(telling.track(range(1), "generating"))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert list(said(events, 1)) == ["block 0", "block 1"]
    assert list(said(events, 2)) == [""]


def said(events: list[dict[str, object]], number: int) -> Iterator[object]:
    return (event["words"] for event in events if event.get("tick") == number)
