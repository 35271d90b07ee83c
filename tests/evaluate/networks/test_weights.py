"""Weights by path or by their name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from stepquant.errors import EvaluationError
from stepquant.evaluate.networks import weights
from stepquant.evaluate.networks.weights import local


def test_a_path_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "hf_hub_download", None)
    assert local("some/inception.safetensors") == Path("some/inception.safetensors")


def test_a_file_and_a_folder_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(weights, "hf_hub_download", lambda *names: asked.append(names) or "cache/file")
    monkeypatch.setattr(
        weights,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or "cache",
    )
    assert local("hub:owner/name/deep/file.safetensors") == Path("cache/file")
    assert local("hub:owner/name") == Path("cache")
    assert asked[0] == ("owner/name", "deep/file.safetensors")
    assert asked[1][0] == "owner/name"
    assert not any(pattern.endswith(("bin", "pt", "pth", "*")) for pattern in asked[1][1])


def test_what_the_hub_cannot_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nand more")

    monkeypatch.setattr(weights, "hf_hub_download", offline)
    with pytest.raises(EvaluationError, match="cannot reach the hub") as caught:
        local("hub:owner/name/file.safetensors")
    assert "and more" not in str(caught.value)
    for wrong in ("hub:", "hub:owner", "hub:/name"):
        with pytest.raises(EvaluationError, match="names nothing"):
            local(wrong)
