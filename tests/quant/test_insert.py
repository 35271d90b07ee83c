import pytest
import torch
from torch import nn

from stepquant.core.affine import scale_and_zero
from stepquant.core.grid import Grid
from stepquant.core.ranges import minmax
from stepquant.errors import RangeError
from stepquant.fit.ranges import set_weight_ranges
from stepquant.models.denoiser import Denoiser
from stepquant.quant.insert import insert
from stepquant.quant.layers import QuantLayer
from stepquant.quant.quantizer import Quantizer, Site
from stepquant.quant.schemes import scheme
from tests.models.tiny import CASES


@pytest.mark.parametrize("name", ["plain", "class_scale_shift", "text_to_image", "size_conditioned"])
@pytest.mark.parametrize("split", [False, True])
def test_switched_off_quantizers_change_nothing(name: str, split: bool) -> None:
    model, arguments, _ = CASES[name]()
    model.eval()
    denoiser = Denoiser(model)
    before, keys = denoiser.predict(arguments), set(model.state_dict())
    sites, concats = denoiser.sites(), denoiser.concats()
    with insert(denoiser, scheme("w8a8"), split=split) as network:
        assert torch.allclose(denoiser.predict(arguments), before, atol=2e-5)
        assert len(network.layers) == len(sites) + (len(concats) if split else 0)
        assert set(network.splits) == (set(concats) if split else set())
    assert torch.equal(denoiser.predict(arguments), before)
    assert set(model.state_dict()) == keys


def test_the_float_model_returns_after_an_exception() -> None:
    model, arguments, _ = CASES["plain"]()
    denoiser = Denoiser(model.eval())
    before = denoiser.predict(arguments)
    with pytest.raises(KeyboardInterrupt), insert(denoiser, scheme("w8a8"), split=True):
        raise KeyboardInterrupt
    assert torch.equal(denoiser.predict(arguments), before)
    assert not any(isinstance(module, QuantLayer) for module in model.modules())


def test_an_unset_quantizer_names_its_site() -> None:
    model, arguments, _ = CASES["plain"]()
    denoiser = Denoiser(model.eval())
    with insert(denoiser, scheme("w8a8")) as network:
        set_weight_ranges(network, minmax)
        network.switch(weights=True, inputs=True)
        with pytest.raises(RangeError, match=r"resnets\.0\.conv1:input"):
            denoiser.predict(arguments)


def test_a_layer_computes_with_the_grid_points_of_its_weight() -> None:
    """Independent route: replace the float weight by dequantized integers and run the plain layer."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, padding=1)
    grid = Grid.parse("int4/channel")
    quantizer = Quantizer(grid, Site("conv", "conv", "weight"))
    rows = conv.weight.detach().flatten(1)
    quantizer.set_range(*scale_and_zero(*minmax(rows, grid), grid))
    quantizer.enabled = True
    layer = QuantLayer(conv, "conv", quantizer, None)
    x = torch.randn(2, 5, 6, 6)
    scale = rows.abs().amax(1) / 7
    integers = (rows / scale[:, None]).round()
    plain = nn.Conv2d(5, 7, 3, padding=1)
    plain.bias = conv.bias
    plain.weight = nn.Parameter((integers * scale[:, None]).reshape(conv.weight.shape))
    assert torch.equal(layer.weight_integers().flatten(1), integers)
    assert torch.allclose(layer(x), plain(x), atol=1e-5)


def test_a_range_must_be_finite() -> None:
    quantizer = Quantizer(Grid.parse("uint8/tensor"), Site("a.b", "conv", "input"))
    with pytest.raises(RangeError, match=r"a\.b:input"):
        quantizer.set_range(torch.tensor([float("nan")]), torch.tensor([0.0]))
