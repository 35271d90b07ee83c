from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.ranges import minmax
from stepquant.fit.blocks import fit_blocks
from stepquant.fit.correct_bias import correct_block, correct_products
from stepquant.fit.journal import Journal
from stepquant.fit.learner import Sample
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.fit.streams import Streams
from stepquant.models.denoiser import Denoiser
from stepquant.models.split import SplitLayer
from stepquant.quant.freeze import freeze, packed_tensors
from stepquant.quant.insert import insert
from stepquant.quant.layers import QuantLayer
from stepquant.quant.schemes import scheme


def means(network: Any, data: Any, *, quantized: bool) -> dict[str, torch.Tensor]:
    """Mean of every output channel of every layer, by plain passes of the whole network over all records."""
    network.switch(weights=quantized, inputs=quantized)
    found: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in network.denoiser.model.named_modules():
        if not isinstance(module, SplitLayer | QuantLayer) or (
            path.endswith((".0", ".1")) and "to_" not in path
        ):
            continue

        def listen(m: Any, a: Any, out: torch.Tensor, path: str = path) -> None:
            linear = isinstance(m, QuantLayer) and isinstance(m.layer, torch.nn.Linear)
            found[path] = (
                out.double().flatten(0, -2).mean(0)
                if linear
                else out.double().transpose(0, 1).flatten(1).mean(1)
            )

        handles.append(module.register_forward_hook(listen))
    with torch.no_grad():
        network.denoiser.predict(data.take(range(len(data))).arguments)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("split", [False, True])
def test_corrected_layers_do_not_err_on_average(source: Source, tmp_path: Path, split: bool) -> None:
    data = source.record(every(8, (0, 5, 9)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w4a8"), split=split) as network,
        Streams(network, data, source.cache, batch=12) as streams,
    ):
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        exact = means(network, data, quantized=False)
        before = means(network, data, quantized=True)
        journal = Journal(tmp_path, network, data, {})
        fit = partial(correct_block, network, batch=12)
        fit_blocks(streams, fit, journal, stage="biases", activations=True)
        after = means(network, data, quantized=True)
        assert set(after) == {
            path.removesuffix(".0") if path.removesuffix(".0") in network.splits else path
            for path, layer in network.layers.items()
            if layer.layer.bias is not None
        }
        for path, mean in after.items():
            # Up to values that other batch sizes round to the other side.
            assert (mean - exact[path]).abs().max() < 1e-3 * exact[path].abs().max(), path
            assert (mean - exact[path]).abs().max() < 0.1 * (before[path] - exact[path]).abs().max() + 1e-5, (
                path
            )
        assert sum(float((before[path] - exact[path]).abs().max()) > 1e-3 for path in after) > len(after) / 2

        float_again = means(network, data, quantized=False)
        assert all(torch.equal(mean, exact[path]) for path, mean in float_again.items()), (
            "float layers keep their bias"
        )

        layer = network.layers["conv_in"]
        stored = packed_tensors(layer)["bias"]
        assert torch.equal(stored, layer.layer.bias + layer.correction)
        assert not torch.equal(stored, layer.layer.bias)

        # A run that goes on from the journal ends at the same biases.
        corrections = {path: layer.correction for path, layer in network.layers.items()}
        for each in network.layers.values():
            each.correction = None
        fit_blocks(streams, None, journal, stage="biases", activations=True)  # type: ignore[arg-type]
        for path, each in network.layers.items():
            same = each.correction is corrections[path] or torch.equal(each.correction, corrections[path])
            assert same, path


def test_one_linear_is_corrected_by_the_closed_form(source: Source) -> None:
    """shift = (W - Q(W)) E[x] + E[W x - W Q(x)], here for the first layer that t reaches."""
    data = source.record(every(6, (0, 4, 9)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w4a8")) as network,
        Streams(network, data, source.cache, batch=6) as streams,
    ):
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        piece = next(p for p in streams.pieces if p.path == "time_embedding.linear_1")
        network.switch(weights=False, inputs=False)
        floats = streams.inputs(piece, quantized=False)
        layer = network.layers[piece.path]
        network.switch(weights=True, inputs=True)
        rows = torch.arange(len(data))
        targets = streams.advance(piece, floats, quantized=False)
        correct_block(network, piece, Sample(floats, floats, targets, rows, rows), 0)
        mean = floats.columns[0].mean(0)
        expected = (layer.weight - layer.weight_values()) @ mean
        torch.testing.assert_close(layer.correction, expected, rtol=1e-3, atol=1e-6)


def test_quantized_probabilities_sum_to_one_on_average(source: Source, tmp_path: Path) -> None:
    """Exact probabilities sum to 1 over the keys, so that 1 / keys is the mean that corrected ones must have."""
    data = source.record(every(6, (0, 4, 9)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w4a8")) as network,
        Streams(network, data, source.cache, batch=6) as streams,
    ):
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        for product in network.products.values():  # coarse steps: most probabilities vanish
            product.probabilities.set_range(torch.tensor([0.1]), torch.tensor([0.0]))
        journal = Journal(tmp_path, network, data, {})
        fit = partial(correct_products, network, batch=6)
        fit_blocks(streams, fit, journal, stage="probabilities", activations=True)
        for path, product in network.products.items():
            seen: list[torch.Tensor] = []
            product.probabilities.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            network.switch(weights=True, inputs=True)
            with torch.no_grad():
                network.denoiser.predict(data.take(range(len(data))).arguments)
            (quantized,) = seen
            keys = quantized.shape[-1]
            lacking = 1 / keys - float(quantized.double().mean())
            assert abs(lacking) > 0.01 / keys, path
            assert float(product.correction) == pytest.approx(lacking, rel=0.02, abs=1e-4 / keys), path

        artifact = freeze(network)
        path = next(iter(network.products))
        assert artifact.products[path].shifted
        assert torch.equal(
            artifact.tensors[f"{path}.product.probabilities_shift"], network.products[path].correction
        )
        corrections = {path: product.correction for path, product in network.products.items()}
        for product in network.products.values():
            product.correction = None
        fit_blocks(streams, None, journal, stage="probabilities", activations=True)  # type: ignore[arg-type]
        assert all(
            torch.equal(product.correction, corrections[path]) for path, product in network.products.items()
        )


def slopes(network: Any, data: Any, path: str) -> torch.Tensor:
    """Of every channel of a layer's output over what it is in float, by least squares, from plain passes of the whole network."""
    seen: list[torch.Tensor] = []
    layer = network.layers[path]
    linear = isinstance(layer.layer, torch.nn.Linear)
    handle = layer.register_forward_hook(
        lambda m, a, out: seen.append((out if linear else out.movedim(1, -1)).double().flatten(0, -2))
    )
    for quantized in (False, True):
        network.switch(weights=quantized, inputs=quantized)
        with torch.no_grad():
            network.denoiser.predict(data.take(range(len(data))).arguments)
    handle.remove()
    exact, found = seen
    lines = [
        torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution
        for x, y in zip(exact.T, found.T)
    ]
    return torch.stack([line[0, 0] for line in lines])


def test_scaled_channels_are_as_long_as_they_were_and_integers_stay(source: Source, tmp_path: Path) -> None:
    data = source.record(every(8, (0, 5, 9)))
    with (
        insert(Denoiser.of(source.pipeline), scheme("w4a4")) as network,
        Streams(network, data, source.cache, batch=12) as streams,
    ):
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax)
        before = {path: slopes(network, data, path) for path in network.layers}
        packed = {path: packed_tensors(layer) for path, layer in network.layers.items()}
        journal = Journal(tmp_path, network, data, {})
        fit = partial(correct_block, network, batch=12, gain=True)
        fit_blocks(streams, fit, journal, stage="biases", activations=True)
        exact, after = (means(network, data, quantized=quantized) for quantized in (False, True))
        for path, layer in network.layers.items():
            found = slopes(network, data, path)
            scaled = (layer.weight_quantizer.scale / packed[path]["weight_scale"]).log().abs()
            inside = (scaled > 0) & (scaled < torch.tensor(1.25).log() - 1e-3)
            assert (found[inside] - 1).abs().max() < 1e-3, path
            assert (after[path] - exact[path]).abs().max() < 1e-3 * exact[path].abs().max(), path
            assert torch.equal(packed_tensors(layer)["weight"], packed[path]["weight"])
        away = torch.cat([(one - 1).abs() for one in before.values()])
        left = torch.cat([(slopes(network, data, path) - 1).abs() for path in network.layers])
        assert left.median() < 0.1 * away.median()
        scales = {path: layer.weight_quantizer.scale for path, layer in network.layers.items()}
        for layer in network.layers.values():
            layer.correction = layer.rounding = None
            layer.weight_quantizer.fit(layer.weight.flatten(1), minmax)
        fit_blocks(streams, None, journal, stage="biases", activations=True)  # type: ignore[arg-type]
        assert all(
            torch.equal(network.layers[path].weight_quantizer.scale, one) for path, one in scales.items()
        )
