"""A few of the random mutations of `make torture`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.torture import mutations


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    mutations.make(tmp_path)
    found = [mutations.outcome(tmp_path, 0, index) for index in range(60)]
    assert not [words for kind, words in found if kind in mutations.BAD]
    assert Counter(kind for kind, _ in found)["refused"] > 40


def test_another_image_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forged legal values are another artifact, whose image the harness tells from the former one."""
    forged = mutations.Damage("scaled", mutations.scaled, forged=True)
    monkeypatch.setattr(mutations, "DAMAGES", (forged,))
    mutations.make(tmp_path)
    assert "other" in {mutations.outcome(tmp_path, 0, index)[0] for index in range(8)}
