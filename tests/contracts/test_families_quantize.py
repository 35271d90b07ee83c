"""Every declared family, all the way: ranges from calls, frozen, lowered, and run in integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from stepquant.artifact import Artifact
from stepquant.core.ranges import minmax
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.quant.freeze import freeze
from stepquant.quant.insert import insert
from stepquant.quant.schemes import scheme
from stepquant.runtime import ops
from stepquant.runtime.coverage import ASTRAY, IDLE, INLINE, Coverage, coverage
from stepquant.runtime.lower import lower
from tests.models.tiny import CASES
from tests.runtime.synthetic import share_of_able


@dataclass(frozen=True)
class Calls:
    """Arguments of calls, in place of what is recorded along trajectories."""

    arguments: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.arguments)

    def batches(self, _: int) -> Iterator[Calls.One]:
        return map(Calls.One, self.arguments)

    @dataclass(frozen=True)
    class One:
        arguments: Mapping[str, Any]


def quantized(denoiser: Denoiser, calls: Calls) -> tuple[Artifact, list[Tensor]]:
    """What a model freezes to, and what it predicts with its operands on their grids."""
    with torch.no_grad(), insert(denoiser, scheme("w8a8")) as network:
        set_weight_ranges(network, minmax)
        set_input_ranges(network, calls, minmax)  # type: ignore[arg-type]
        return freeze(network), [denoiser.predict(one) for one in calls.arguments]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", CASES)
def test_every_family_runs_in_integers(name: str) -> None:
    torch.manual_seed(0)
    model, arguments, changed = CASES[name]()
    others = {name: value for new in changed.values() for name, value in new.items()}
    calls = Calls((arguments, {**arguments, **changed["x"]}, {**arguments, **others}))
    denoiser = Denoiser(model.eval())
    with torch.no_grad():
        exact = [denoiser.predict(one) for one in calls.arguments]
    artifact, pretended = quantized(denoiser, calls)
    served = Denoiser(lower(deepcopy(model), artifact, torch.float32))
    # The first call runs as it is written, the second is recorded, the third replayed.
    for one, there, here in zip(calls.arguments, exact, pretended):
        with torch.no_grad():
            found = served.predict(one)
        assert error(here, there) < 0.25
        # Roundings that fall the other way change as much as rounding does, and no more.
        assert error(found, here) < 0.02 + 1.5 * error(here, there)
    check_coverage(denoiser, coverage(served.model, arguments))


@pytest.mark.parametrize("name", ["text_to_image", "pixart", "sd3_dual", "wan", "animated", "stable_audio"])
def test_packed_weights_alone_run_beside_attention_in_float(name: str) -> None:
    """In the dtypes of every day: what reads a text and what reads the image meet in one attention."""
    torch.manual_seed(0)
    model, arguments, _ = CASES[name]()
    denoiser = Denoiser(model.eval())
    with torch.no_grad(), insert(denoiser, scheme("w8a16")) as network:
        exact = denoiser.predict(arguments)
        set_weight_ranges(network, minmax)
        artifact = freeze(network)
    with torch.no_grad():
        assert error(Denoiser(lower(model, artifact)).predict(arguments), exact) < 0.05


def check_coverage(denoiser: Denoiser, seen: Coverage) -> None:
    """What is planned runs in integers, or says why not."""
    assert not [line for line in seen.lines if line.reason == IDLE and line.path in denoiser.sites()]
    planned = [line for line in seen.lines if line.planned]
    assert not [line for line in planned if line.reason in (ASTRAY, INLINE)]
    assert share_of_able(seen) >= (0.99 if ops.compiled() else 0)
