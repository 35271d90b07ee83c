import pytest
import torch
from torch import nn

from stepquant.errors import ModelError
from stepquant.models.split import SplitLayer, split_concats, split_layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda bias: nn.Conv2d(7, 5, 3, padding=1, stride=2, bias=bias), (2, 7, 9, 9)),
        (lambda bias: nn.Conv1d(7, 5, 3, dilation=2, bias=bias), (2, 7, 9)),
        (lambda bias: nn.Linear(7, 5, bias=bias), (2, 4, 7)),
    ],
)
def test_halves_add_up_to_the_whole(make, shape, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = make(bias).double(), torch.randn(shape, dtype=torch.float64)
    split = split_layer(layer, (4, 3), "layer")
    torch.testing.assert_close(split(x), layer(x), rtol=1e-12, atol=1e-12)
    names = {"0.weight", "1.weight"} | ({"0.bias"} if bias else set())
    assert set(split.state_dict()) == names
    assert (split.in_channels, split.out_channels) == (7, 5)


def test_splitting_a_model_and_back() -> None:
    model = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x, first = torch.randn(1, 6, 3, 3), model[0]
    unsplit = split_concats(model, {"0": (2, 4)})
    assert isinstance(model[0], SplitLayer)
    torch.testing.assert_close(model(x), nn.Sequential(first, *list(model)[1:])(x))
    unsplit()
    assert model[0] is first


def test_a_hollow_layer_splits_without_memory() -> None:
    with torch.device("meta"):
        layer = nn.Conv2d(6, 4, 1)
    assert {t.device.type for t in split_layer(layer, (2, 4), "layer").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 6, 3, groups=2), nn.LayerNorm(6), nn.Conv2d(5, 6, 3)])
def test_what_cannot_be_split_is_named(layer: nn.Module) -> None:
    with pytest.raises(ModelError, match="up.conv1"):
        split_layer(layer, (3, 3), "up.conv1")
