"""Small image classifiers whose penultimate features measure samples without Inception."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# Keeps the first logits small, so that training may start at a high rate.
LOGIT_SCALE = 1 / 8


class FeatureBlock(nn.Sequential):
    """Two 3x3 convolutions around a halving of the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels_out),
            nn.GELU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.GELU(),
        )


class FeatureNet(nn.Module):
    """Images (n, 3, size, size) in [0, 1] to penultimate features (n, num_features).

    `num_features` is what torchmetrics' `FrechetInceptionDistance(feature=...)` asks of a custom module.

    features: of a layer that reads every place of the last map; None takes the maximum over places of each channel,
        for pictures whose content may be anywhere.
    mirrored: outside training features are those of the image and of its mirror image, averaged.
    classes: their names, in the order of the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        widths: Sequence[int] = (64, 192, 256),
        num_classes: int = 10,
        size: int = 32,
        features: int | None = None,
        mirrored: bool = True,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "num_classes": num_classes, "size": size}
        self.config |= {"features": features, "mirrored": mirrored, "classes": list(classes)}
        self.size, self.mirrored, self.classes = size, mirrored, tuple(classes)
        self.num_features = features or widths[-1]
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.25))
        # Sees 2x2 patches through their principal components and the negatives of these.
        self.stem = nn.Conv2d(3, 24, 2)
        channels = (24, *widths)
        self.blocks = nn.Sequential(*map(FeatureBlock, channels[:-1], channels[1:]))
        side = (size - 1) // 2 ** len(widths)
        self.gather = nn.Linear(widths[-1] * side**2, features) if features else None
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Penultimate features."""
        features = self.embed(images)
        if self.training or not self.mirrored:
            return features
        return (features + self.embed(images.flip(-1))) / 2

    def embed(self, images: Tensor) -> Tensor:
        """Penultimate features of the images as they are."""
        hidden = nn.functional.gelu(self.stem((images - self.mean) / self.std))
        hidden = self.blocks(hidden)
        if self.gather is not None:
            gathered: Tensor = self.gather(hidden.flatten(1))
            return gathered
        # Not `amax`: its compiled gradient under bf16 autocast is not finite (torch 2.13, CPU).
        return nn.functional.max_pool2d(hidden, hidden.shape[-1]).flatten(1)

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self(images)) * LOGIT_SCALE


def load_feature_net(folder: Path) -> FeatureNet:
    """The network of a folder with config.json and safetensors, in float32, ready to measure."""
    config = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    net = FeatureNet(**config)
    net.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
    return net.eval().requires_grad_(False)
