"""LPIPS (arXiv:1801.03924): the distance of two images in the features of a classifier, weighted by human judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepquant.core.digest import tensors_digest
from stepquant.errors import EvaluationError
from stepquant.evaluate.metrics.pairs import PairMetric
from stepquant.evaluate.networks.weights import load, read_weights

HINT = (
    'python -c "import torch, torchvision, safetensors.torch as s; '
    "n = torchvision.models.alexnet(weights='DEFAULT').state_dict(); "
    "n = {k: v for k, v in n.items() if k.startswith('features')}; "
    "s.save_file(n | torch.load('alex.pth', weights_only=True), 'lpips.safetensors')\""
)
# Mean and spread of ImageNet for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10

# Layers of torchvision's `features`: convolutions (channels, kernel, stride, padding), "pool" or "relu"; a tapped ReLU
# is one whose output is compared.
Layer = tuple[int, int, int, int] | str
ALEXNET: tuple[Layer, ...] = (
    (64, 11, 4, 2), "tap", "pool", (192, 5, 1, 2), "tap", "pool", (384, 3, 1, 1), "tap", (256, 3, 1, 1), "tap",
    (256, 3, 1, 1), "tap",
)  # fmt: skip
VGG16: tuple[Layer, ...] = (
    (64, 3, 1, 1), "relu", (64, 3, 1, 1), "tap", "pool", (128, 3, 1, 1), "relu", (128, 3, 1, 1), "tap", "pool",
    (256, 3, 1, 1), "relu", (256, 3, 1, 1), "relu", (256, 3, 1, 1), "tap", "pool",
    (512, 3, 1, 1), "relu", (512, 3, 1, 1), "relu", (512, 3, 1, 1), "tap", "pool",
    (512, 3, 1, 1), "relu", (512, 3, 1, 1), "relu", (512, 3, 1, 1), "tap",
)  # fmt: skip
POOLS = {"AlexNet": 3, "VGG16": 2}  # window; the stride is 2
BACKBONES: dict[str, tuple[Layer, ...]] = {"AlexNet": ALEXNET, "VGG16": VGG16}
SMALLEST = 32


class Backbone(nn.Module):
    """The features of a classifier at its tapped ReLUs, and how much each channel of them counts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.taps: list[int] = []
        layers: list[nn.Module] = []
        channels, widths = 3, []
        for layer in BACKBONES[name]:
            if isinstance(layer, tuple):
                layers.append(nn.Conv2d(channels, *layer))
                channels = layer[0]
            elif layer == "pool":
                layers.append(nn.MaxPool2d(POOLS[name], 2))
            else:
                layers.append(nn.ReLU())
                if layer == "tap":
                    self.taps.append(len(layers) - 1)
                    widths.append(channels)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, width, 1, 1)) for width in widths])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair of images (n, 3, h, w) in [0, 1]."""
        x, total = torch.cat([normalize(a), normalize(b)]), torch.zeros(len(a), dtype=torch.float64)
        heads = iter(self.heads)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                # Eq. 1, arXiv:1801.03924: unit length along channels, squared differences, weighted, mean over space.
                first, second = (x / (x.square().sum(1, keepdim=True).sqrt() + TINY)).chunk(2)
                apart = (first - second).square() * next(heads)
                total += apart.sum(1).mean((1, 2)).double().cpu()
        return total


def normalize(images: Tensor) -> Tensor:
    shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (SHIFT, SCALE))
    return (2 * images - 1 - shift) / scale


@dataclass(frozen=True)
class Lpips:
    """The distance with its weights loaded."""

    net: Backbone
    name: str
    digest: str

    def __call__(self, a: Tensor, b: Tensor) -> Tensor | None:
        """A number for each pair; None where images are smaller than the network reads."""
        if min(a.shape[-2:]) < SMALLEST or a.shape[1] != 3:
            return None
        with torch.no_grad():
            found: Tensor = self.net(a.float(), b.float())
        return found

    def metric(self) -> PairMetric:
        why = f"its network reads images of at least {SMALLEST} pixels in three channels"
        return PairMetric(
            "LPIPS", self, "lower", "", f"{self.name}, per image, then the mean", why, self.digest
        )


def load_lpips(file: Path) -> Lpips:
    """From a safetensors file with the convolutions of torchvision's AlexNet or VGG16 and LPIPS' linear weights."""
    found = {name: value.float() for name, value in load(file, "LPIPS", HINT).items()}
    name = next(
        (name for name, layers in BACKBONES.items() if first_shape(found) == shape_of(layers[0])), None
    )
    if name is None:
        raise EvaluationError(
            "this file holds neither AlexNet nor VGG16",
            where=str(file),
            got=f"features.0.weight {first_shape(found)}",
            fix=HINT,
        )
    net = Backbone(name)
    state = read_weights(file, outside_names(net), what=f"LPIPS with {name}", hint=HINT)
    inside = {outside(key): key for key in net.state_dict()}
    net.load_state_dict({inside[key]: value for key, value in state.items()})
    return Lpips(net.eval().requires_grad_(False), name, tensors_digest(state)[:12])


def first_shape(found: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    return tuple(found["features.0.weight"].shape) if "features.0.weight" in found else None


def shape_of(layer: Layer) -> tuple[int, ...]:
    assert isinstance(layer, tuple)
    return (layer[0], 3, layer[1], layer[1])


def outside_names(net: Backbone) -> dict[str, Tensor]:
    return {outside(name): value for name, value in net.state_dict().items()}


def outside(name: str) -> str:
    """The name of a tensor in torchvision's and LPIPS' own files."""
    kind, _, rest = name.partition(".")
    return f"lin{rest}.model.1.weight" if kind == "heads" else name
