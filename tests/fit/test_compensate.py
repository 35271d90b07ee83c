from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from stepquant.core.pack import unpack
from stepquant.fit.blocks import fit_blocks, without_gradients
from stepquant.fit.compensate import Compensation, InputHessian, calls, compensate_block, run_until, unfolded
from stepquant.fit.journal import Journal
from stepquant.fit.learnable import FixedIntegers
from stepquant.fit.learner import inside
from stepquant.quant.freeze import packed_tensors
from tests.fit.conftest import Bench


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, (3, 2), stride=2, dilation=2, padding="valid"),
        nn.Conv2d(6, 4, 3, padding=1, groups=2, padding_mode="circular"),
        nn.Conv1d(6, 4, 4, padding="same"),
        nn.Conv3d(6, 4, (1, 3, 2), padding=(0, 2, 1), stride=(1, 1, 2)),
    ],
    ids=repr,
)
def test_patches_times_weights_are_the_outputs(layer: nn.Module) -> None:
    shape = {nn.Linear: (3, 7, 6), nn.Conv1d: (3, 6, 9), nn.Conv3d: (3, 6, 2, 5, 4)}.get(
        type(layer), (3, 6, 8, 9)
    )
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = layer(x) - (
            layer.bias if isinstance(layer, nn.Linear) else layer.bias.reshape(-1, *[1] * (x.ndim - 2))
        )
        rows = unfolded(layer, x)
        found = torch.cat([r @ w.T for r, w in zip(rows, layer.weight.flatten(1).chunk(len(rows)))], 1)
        hessian = InputHessian(layer)
        hessian.add(x[:1])
        hessian.add(x[1:])
    expected = out if isinstance(layer, nn.Linear) else out.movedim(1, -1)
    torch.testing.assert_close(found, expected.reshape(-1, found.shape[1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hessian.mean(), rows.transpose(1, 2) @ rows / rows.shape[1])


def test_blocks_end_below_rounding_to_nearest_and_are_restored_from_the_journal(
    bench: Bench, tmp_path: Path
) -> None:
    settings = Compensation(batch=12)
    found = []
    for _ in range(2):
        journal = Journal(tmp_path, bench.network, bench.data, {})
        fit = partial(compensate_block, bench.network, settings=settings)
        reports = fit_blocks(bench.streams, fit, journal, stage="weights", activations=False, held=0.25)
        found.append({path: layer.weight_integers() for path, layer in bench.network.layers.items()})
        for layer in bench.network.layers.values():
            layer.rounding = None
    assert all(report.hard <= report.nearest for report in reports)
    blocks = [report for report in reports if report.path in bench.network.denoiser.blocks()]
    assert sum(report.hard < report.nearest for report in blocks) > 0.8 * len(blocks)
    assert sum(report.hard / report.nearest for report in blocks) < 0.9 * len(blocks)
    assert all(torch.equal(first, found[1][path]) for path, first in found[0].items())
    assert len(list(tmp_path.rglob("weights/*.safetensors"))) == len(reports)


def test_integers_that_move_by_more_than_a_step_are_stored(bench: Bench) -> None:
    piece, sample = next((p, s) for p, s in bench.samples() if p.path == "mid_block.resnets.0")
    bench.network.switch(weights=True, inputs=False)
    layers = inside(bench.network.layers, piece.path)
    before = {path: layer.weight_integers() for path, layer in layers.items()}
    with without_gradients(bench.network):
        report = compensate_block(bench.network, piece, sample, 0, Compensation(batch=12))
    assert report.hard < report.nearest
    moved = torch.cat(
        [(layers[path].weight_integers() - old).abs().flatten() for path, old in before.items()]
    )
    assert moved.max() > 1
    for layer in layers.values():
        assert isinstance(layer.rounding, FixedIntegers)
        layer.input_quantizer = None
        stored = unpack(packed_tensors(layer)["weight"], layer.weight_quantizer.grid, layer.weight.numel())
        assert torch.equal(stored.float(), layer.weight_integers().reshape(-1))


def test_layers_are_taken_in_the_order_of_their_calls_and_what_follows_is_not_run(bench: Bench) -> None:
    piece, sample = next((p, s) for p, s in bench.samples() if p.path == "up_blocks.1.resnets.0")
    layers = inside(bench.network.layers, piece.path)
    with torch.no_grad():
        order = [path.rpartition(".")[2] for path in calls(piece, layers, sample)]
        assert order == ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]
        seen, run = [], []
        handle = layers[f"{piece.path}.conv2"].register_forward_hook(lambda *_: run.append(1))
        for path in (f"{piece.path}.conv1", f"{piece.path}.conv2"):
            run_until(piece, layers[path], sample.quants.take(sample.held), seen.append)
        handle.remove()
    assert [x.shape[1] for x in seen] == [
        layers[f"{piece.path}.{name}"].weight.shape[1] for name in ("conv1", "conv2")
    ]
    assert not run


class ByKeyword(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


def test_a_layer_that_is_called_by_keyword_is_rounded_alike(bench: Bench) -> None:
    """As UNetMotionModel calls its projections."""
    piece, sample = next((p, s) for p, s in bench.samples() if p.path == "down_blocks.0.resnets.0")
    block, layer = piece.module, bench.network.layers["down_blocks.0.resnets.0.conv2"]
    found = []
    for called in (layer, ByKeyword(layer)):
        block.conv2, layer.rounding = called, None
        with torch.no_grad():
            compensate_block(bench.network, piece, sample, 0, Compensation(batch=12))
        assert layer.rounding is not None
        found.append(layer.weight_integers())
    assert torch.equal(*found)


def test_records_that_weigh_as_much_as_several_are_as_several() -> None:
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(6, 4), torch.randn(3, 5, 6)),
        (nn.Conv2d(2, 3, 3, padding=1), torch.randn(3, 2, 4, 4)),
    ):
        weighed, repeated = InputHessian(layer), InputHessian(layer)
        weighed.add(x, torch.tensor([0.0, 1.0, 3.0]))
        repeated.add(torch.cat([x[1:2], x[2:], x[2:], x[2:]]))
        torch.testing.assert_close(weighed.total, repeated.total)
