from __future__ import annotations

from typing import Any

import pytest
import torch

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import minmax
from stepquant.errors import CalibrationError
from stepquant.fit.ranges import set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.schemes import scheme
from tests.fit.conftest import Bench


def watch(bench: Bench, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """First argument and result of a module in one plain pass over all records."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        seen.append((args[0], out))

    handle = bench.network.denoiser.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        bench.network.denoiser.predict(bench.data.take(range(len(bench.data))).arguments)
    handle.remove()
    return seen[0]


def test_pieces_are_all_blocks_and_the_layers_outside_in_order_of_their_calls(bench: Bench) -> None:
    paths = [piece.path for piece in bench.streams.pieces]
    assert set(paths) - set(bench.network.denoiser.blocks()) == {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "conv_in",
        "conv_out",
    }
    assert [
        path for path in paths if path in bench.network.denoiser.blocks()
    ] == bench.network.denoiser.blocks()
    assert paths[-1] == "conv_out"
    assert paths.index("conv_in") < paths.index("down_blocks.0.resnets.0")


def test_streams_hold_what_a_plain_pass_shows(bench: Bench) -> None:
    """Replayed blocks give the same inputs and outputs as running the whole network, in float and quantized."""
    found = {piece.path: sample for piece, sample in bench.samples()}
    for path in ("down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.0", "conv_out"):
        bench.network.switch(weights=False, inputs=False)
        inputs, outputs = watch(bench, path)
        torch.testing.assert_close(found[path].floats.columns[0], inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[path].targets.columns[0], outputs, rtol=1e-4, atol=1e-5)
        bench.network.switch(weights=True, inputs=False)
        torch.testing.assert_close(found[path].quants.columns[0], watch(bench, path)[0], rtol=1e-4, atol=1e-5)


def test_forwards_are_put_back(bench: Bench) -> None:
    for _ in bench.samples():
        pass
    assert not any("forward" in vars(module) for module in bench.network.denoiser.model.modules())


@pytest.mark.parametrize("budget", [0, 1 << 14])
def test_a_small_budget_moves_tables_to_disk_and_changes_nothing(
    bench: Bench, source: Source, budget: int
) -> None:
    piece = next(p for p in bench.streams.pieces if p.path == "down_blocks.0.resnets.0")
    whole = bench.streams.inputs(piece, quantized=False)
    with Streams(bench.network, bench.data, source.cache, batch=12, budget=budget) as small:
        mapped = small.inputs(next(p for p in small.pieces if p.path == piece.path), quantized=False)
        assert mapped.memory <= budget < whole.memory
        assert (mapped.mapped, whole.mapped) == (True, False)
        mapped.touch(torch.tensor([3, 1]))
        for ours, theirs in zip(mapped.columns, whole.columns, strict=True):
            assert torch.equal(ours, theirs)


def test_released_tables_give_their_memory_back(bench: Bench) -> None:
    before = bench.streams.left
    table = bench.streams.inputs(bench.streams.pieces[2], quantized=False)
    assert bench.streams.left == before - sum(c.numel() * c.element_size() for c in table.columns)
    bench.streams.release(table)
    assert bench.streams.left == before


def test_too_few_records_are_one_clear_error(source: Source) -> None:
    data = source.record(every(1, (0, 1)))
    with insert(Denoiser.of(source.pipeline), scheme("w4a8")) as network:
        set_weight_ranges(network, minmax)
        with pytest.raises(CalibrationError, match="too few calibration records"):
            Streams(network, data, source.cache)
