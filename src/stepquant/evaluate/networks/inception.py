"""InceptionV3 as the FID was defined on it: the graph of 2015 with its 1008 classes, and its resize.

The definition (arXiv:1706.08500) is a TensorFlow graph. What it does unlike the published architecture
(arXiv:1512.00567) belongs to the metric: averages of pooling leave the border out, the last block pools by its maximum,
and images are resized from the corner of the first pixel, without smoothing. Names are those of torchvision, under
which the ported weights are passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.digest import tensors_digest
from stepquant.evaluate.networks.reader import View
from stepquant.evaluate.networks.weights import read_weights

SIDE, WIDTH, CLASSES = 299, 2048, 1008
# The spatial features of sFID (arXiv:2103.03841): the first channels of this branch, as in the evaluator of arXiv:2105.05233.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17**2

CHUNK = 32  # images at a time: at this size activations are the most that memory holds
HINT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('pt_inception-2015-12-05-6726825d.pth', weights_only=True), 'inception.safetensors')\""
)

Size = tuple[int, int]
Layer = tuple[str, int, Size, int]  # name, channels, kernel, stride
Chain = Sequence[Layer | tuple[Layer, Layer]]  # a pair of layers reads the same input and is concatenated


class ConvNorm(nn.Module):
    """Convolution, normalization, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Size, stride: int = 1, padding: Size = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Chains of convolutions beside a pooling, concatenated. They keep the size of the image, or halve it without a border."""

    def __init__(self, inputs: int, chains: Sequence[Chain], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.chains, self.pool = [[names(link) for link in chain] for chain in chains], pool
        self.width = pooled or inputs
        for chain in chains:
            channels = inputs
            for link in chain:
                layers = link if isinstance(link[0], tuple) else (link,)
                for name, outputs, kernel, stride in layers:  # type: ignore[misc]
                    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2) if stride == 1 else (0, 0)
                    self.add_module(name, ConvNorm(channels, outputs, kernel, stride, padding))
                channels = sum(layer[1] for layer in layers)  # type: ignore[misc]
            self.width += channels
        if pooled:
            self.branch_pool = ConvNorm(inputs, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.chains:
            out = x
            for link in chain:
                out = torch.cat([self.get_submodule(name)(out) for name in link], 1)
            found.append(out)
        return torch.cat([*found, self.pooling(x)], 1)

    def pooling(self, x: Tensor) -> Tensor:
        if self.pool == "halve":
            return F.max_pool2d(x, 3, stride=2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def names(link: Layer | tuple[Layer, Layer]) -> list[str]:
    return [layer[0] for layer in link] if isinstance(link[0], tuple) else [link[0]]  # type: ignore[index,list-item]


def chain(name: str, *layers: tuple[int, Size], stride: int = 1) -> Chain:
    """Layers name_1, name_2, ...; the stride is that of the last one."""
    last = len(layers)
    return [
        (f"{name}_{i}", outputs, kernel, stride if i == last else 1)
        for i, (outputs, kernel) in enumerate(layers, 1)
    ]


def block_a(inputs: int, pooled: int) -> Mixed:
    one: Layer = ("branch1x1", 64, (1, 1), 1)
    five = chain("branch5x5", (48, (1, 1)), (64, (5, 5)))
    three = chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)))
    return Mixed(inputs, [[one], five, three], "average", pooled)


def block_b(inputs: int) -> Mixed:
    three: Layer = ("branch3x3", 384, (3, 3), 2)
    double = chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2)
    return Mixed(inputs, [[three], double], "halve")


def block_c(inputs: int, inner: int) -> Mixed:
    wide, tall = (inner, (1, 7)), (inner, (7, 1))
    one: Layer = ("branch1x1", 192, (1, 1), 1)
    seven = chain("branch7x7", (inner, (1, 1)), wide, (192, (7, 1)))
    double = chain("branch7x7dbl", (inner, (1, 1)), tall, wide, tall, (192, (1, 7)))
    return Mixed(inputs, [[one], seven, double], "average", 192)


def block_d(inputs: int) -> Mixed:
    three = chain("branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2)
    seven = chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2)
    return Mixed(inputs, [three, seven], "halve")


def block_e(inputs: int, pool: str) -> Mixed:
    one: Layer = ("branch1x1", 320, (1, 1), 1)
    three = [*chain("branch3x3", (384, (1, 1))), fork("branch3x3_2")]
    double = [*chain("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), fork("branch3x3dbl_3")]
    return Mixed(inputs, [[one], three, double], pool, 192)


def fork(name: str) -> tuple[Layer, Layer]:
    return ((f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1))


class InceptionV3(nn.Module):
    """Images (n, 3, h, w) in [0, 1] of any size to pooled features, spatial features and logits without their bias."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3))
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, "average")
        self.Mixed_7c = block_e(2048, "max")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize(images * 255, SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        spatial = x
        for name, block in self.named_children():
            if name == SPATIAL_BLOCK:
                spatial = block.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
            if name.startswith("Mixed"):
                x = block(x)
        pooled = x.mean((2, 3))
        # The bias is left out of the Inception Score, as in both reference evaluators.
        return pooled, spatial.permute(0, 2, 3, 1).flatten(1), pooled @ self.fc.weight.T


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear from the corner of the first pixel, as TensorFlow 1 does with align_corners=False: no half pixel, no smoothing."""
    rows, columns = (weights(size, side, images) for size in images.shape[2:])
    return rows @ images @ columns.T


def weights(size: int, side: int, like: Tensor) -> Tensor:
    """(side, size): the weight of each old pixel in each new one."""
    place = torch.arange(side, dtype=torch.float64) * (size / side)
    low = place.floor().long().clamp(max=size - 1)
    high, share = (low + 1).clamp(max=size - 1), (place - low)
    out = torch.zeros(side, size, dtype=torch.float64)
    row = torch.arange(side)
    out[row, low] += 1 - share
    out[row, high] += share
    return out.to(like)


@dataclass(frozen=True)
class InceptionReader:
    """Pooled and spatial features and class logits in one pass."""

    net: InceptionV3
    digest: str
    resize: str = f"TF1 bilinear to {SIDE}"
    views: tuple[View, ...] = (View("FID", "KID", " (Inception)"), View("sFID"), View("IS", classes=True))

    def read(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            parts = [self.net(part.float()) for part in images.split(CHUNK)]
        return {view.name: torch.cat(rows) for view, rows in zip(self.views, zip(*parts))}


def load_inception(file: Path) -> InceptionReader:
    """The network with the weights of a safetensors file, ready to measure."""
    with torch.device("meta"):
        net = InceptionV3()
    wanted = {name: value for name, value in net.state_dict().items() if not counts(name)}
    found = read_weights(file, wanted, what="the FID's InceptionV3", hint=HINT, ignored=counts)
    net.load_state_dict(found, strict=False, assign=True)
    return InceptionReader(net.eval().requires_grad_(False), tensors_digest(found)[:12])


def counts(name: str) -> bool:
    """Whether a tensor only counts the batches of training."""
    return name.endswith("num_batches_tracked")
