"""Peers are measured, not heard."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stepquant.evaluate.speed.peers import quantized


def test_what_a_peer_prints_does_not_reach_our_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def quantize(model: Any, data: Any, subset_size: int, **preset: str) -> str:
        print("Statistics collection 100%")
        logging.getLogger("nncf").warning("a remark")
        seen.append((model, data, subset_size, preset))
        return "int8"

    kinds = SimpleNamespace(TRANSFORMER="transformer")
    noisy = SimpleNamespace(quantize=quantize, Dataset=list, ModelType=kinds)
    monkeypatch.setitem(sys.modules, "nncf", noisy)  # type: ignore[arg-type]
    assert quantized("model", [{"x": torch.ones(2)}]) == "int8"
    assert seen[0][0] == "model"
    assert seen[0][2:] == (1, {})
    quantized("model", [], transformer=True)
    assert seen[1][3] == {"model_type": "transformer"}
    said = capfd.readouterr()
    assert said.out == said.err == ""
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"
