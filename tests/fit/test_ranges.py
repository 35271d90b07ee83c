from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from stepquant.calib.pick import every
from stepquant.calib.record import Source
from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import lp_search, lp_search_binned, minmax
from stepquant.errors import CalibrationError, StepquantError
from stepquant.fit.ranges import set_input_ranges, set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.plan import Rule
from stepquant.quant.schemes import scheme


def test_weight_ranges_are_those_of_the_search(source: Source) -> None:
    denoiser = Denoiser.of(source.pipeline)
    with insert(denoiser, scheme("w4a8")) as network:
        set_weight_ranges(network, lp_search)
        for layer in network.layers.values():
            grid = layer.weight_quantizer.grid
            rows = layer.weight.flatten(1)
            assert torch.equal(layer.weight_quantizer.scale, scale_and_zero(*lp_search(rows, grid), grid)[0])


def test_first_layer_range_is_the_average_over_batches(source: Source) -> None:
    """conv_in reads x itself, so its range can be computed from the records by hand."""
    denoiser, data = Denoiser.of(source.pipeline), source.record(every(6, (0, 5)))
    stem_too = scheme("w8a8").with_rules(
        [Rule(Grid.parse("uint8/tensor"), "to be checked", ("stem",), ("input",))]
    )
    with insert(denoiser, stem_too) as network:
        set_weight_ranges(network, minmax)
        set_input_ranges(network, data, minmax, batch=5, momentum=0.9)
        low = high = None
        for batch in data.batches(5):
            x = batch.arguments["sample"]
            low = x.min() if low is None else 0.9 * low + 0.1 * x.min()
            high = x.max() if high is None else 0.9 * high + 0.1 * x.max()
        quantizer = network.layers["conv_in"].input_quantizer
        scale, zero_point = scale_and_zero(low, high, quantizer.grid)
        assert quantizer.scale.item() == pytest.approx(scale.item(), rel=1e-5)
        assert quantizer.zero_point.item() == zero_point.item()
        assert all(q.is_set for q in network.quantizers())


def test_later_ranges_see_quantized_inputs(source: Source) -> None:
    """conv_out's range is that of its input behind the quantized network, not of the float one."""
    denoiser, data = Denoiser.of(source.pipeline), source.record(every(4, (5,)))
    seen: list[Tensor] = []
    with insert(denoiser, scheme("w4a4")) as network:
        set_weight_ranges(network, minmax)
        handle = network.layers["conv_out"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        set_input_ranges(network, data, minmax, batch=4)
        handle.remove()
        quantizer = network.layers["conv_out"].input_quantizer
        scale, _ = scale_and_zero(*minmax(seen[0].reshape(1, -1), quantizer.grid), quantizer.grid)
        assert quantizer.scale.item() == pytest.approx(scale.item())
        network.switch(weights=False, inputs=False)
        floats: list[Tensor] = []
        network.layers["conv_out"].register_forward_pre_hook(lambda _, args: floats.append(args[0]))
        denoiser.predict(next(data.batches(4)).arguments)
        assert not torch.allclose(floats[0], seen[0], atol=1e-3)


def test_a_diverging_layer_is_named(source: Source) -> None:
    denoiser, data = Denoiser.of(source.pipeline), source.record(every(2, (5,)))
    with torch.no_grad():
        source.pipeline.unet.conv_norm_out.bias[0] = float("inf")
    with insert(denoiser, scheme("w8a8")) as network:
        set_weight_ranges(network, minmax)
        with pytest.raises(CalibrationError, match=r"conv_out:input"):
            set_input_ranges(network, data, minmax)


def test_better_ranges_predict_better(source: Source) -> None:
    """At 4 bits with an outlier channel, least-error ranges beat whole ranges."""
    denoiser = Denoiser.of(source.pipeline)
    with torch.no_grad():
        for name, weight in denoiser.model.named_parameters():
            if name.endswith("conv1.weight"):
                weight[:, 0, 0, 0] *= 30
    data = source.record(every(8, (3, 6, 9)))
    arguments = next(data.batches(24)).arguments
    target = denoiser.predict(arguments)

    def error(search, binned) -> float:
        with insert(denoiser, scheme("w4a8")) as network, torch.no_grad():
            set_weight_ranges(network, search)
            set_input_ranges(network, data, binned)
            return (denoiser.predict(arguments) - target).pow(2).mean().item()

    assert error(partial(lp_search, p=2.4), lp_search_binned) < error(minmax, minmax)


def test_errors_leave_no_observer(source: Source) -> None:
    denoiser, data = Denoiser.of(source.pipeline), source.record(every(2, (5,)))
    with insert(denoiser, scheme("w8a8")) as network:
        set_weight_ranges(network, minmax)

        def broken(*_: object) -> tuple[Tensor, Tensor]:
            raise StepquantError("broken")

        with pytest.raises(StepquantError):
            set_input_ranges(network, data, broken)
        assert all(q.observer is None for q in network.quantizers())
