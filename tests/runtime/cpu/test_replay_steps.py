"""Recorded calls of a model whose ranges change from step to step: one sequence for each row of the ranges."""

from __future__ import annotations

import copy

import pytest
import torch

from stepquant.calib.record import Source
from stepquant.runtime import ops
from stepquant.runtime.cpu import replay
from stepquant.runtime.cpu.replay import Replay
from stepquant.runtime.lower import lower
from tests.runtime.test_steps import noise, stepped


@pytest.mark.skipif(not ops.compiled(), reason="the extension stepquant._C was not built")
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("kept", [1, 64])
def test_every_row_has_its_own_sequence(
    source: Source, table: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "KEPT_KINDS", kept)
    artifact, _, _ = stepped(source, groups=2, table=table)
    recorded = lower(copy.deepcopy(source.pipeline.unet), artifact)
    plain = lower(copy.deepcopy(source.pipeline.unet), artifact)
    own = recorded.__dict__["forward"].forward
    assert isinstance(own, Replay)
    plain.__dict__["forward"].own = own_forward(plain)
    with torch.no_grad():
        for turn in range(4):
            for t in source.times():
                x = noise(2) + turn
                want = plain(x, t, return_dict=False)[0]
                assert torch.equal(recorded(x, t, return_dict=False)[0], want)
    made = [sequence for sequence in own.sequences.values() if sequence is not None and sequence is not False]
    assert len(made) == 2


def own_forward(model: torch.nn.Module) -> object:
    return type(model).forward.__get__(model)
