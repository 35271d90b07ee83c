"""Layers over a concatenation, rewritten exactly as the sum of two layers, one on each half of the channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import ModelError


class SplitLayer(nn.Module):
    """The sum of layers `0`, `1`, ... on consecutive channels of the input; only the first has a bias."""

    def __init__(self, parts: Iterable[nn.Module], widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        for index, part in enumerate(parts):
            self.add_module(str(index), part)
        self.widths, self.dim = tuple(widths), dim

    @property
    def in_channels(self) -> int:
        return sum(self.widths)

    @property
    def out_channels(self) -> int:
        first = self.get_submodule("0")
        return int(getattr(first, "out_channels", None) or first.out_features)  # type: ignore[arg-type]

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:
        first, *rest = zip(self.children(), input.split(self.widths, self.dim))
        total = first[0](first[1])
        for part, piece in rest:
            total = total + part(piece)
        return total  # type: ignore[no-any-return]


def split_layer(layer: Any, widths: tuple[int, ...], path: str) -> SplitLayer:
    """`layer` as a `SplitLayer` with copies of its weights (on the meta device: their shapes)."""
    conv = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not (conv or isinstance(layer, nn.Linear)) or getattr(layer, "groups", 1) != 1:
        raise ModelError(f"layer '{path}' cannot be split", got=repr(layer), expected="an ungrouped layer")
    if layer.weight.shape[1] != sum(widths):
        raise ModelError(
            f"layer '{path}' cannot be split",
            got=f"widths {widths}",
            expected=f"{layer.weight.shape[1]} inputs",
        )
    pieces = layer.weight.detach().split(list(widths), dim=1)
    parts = [part_like(layer, piece, bias=index == 0) for index, piece in enumerate(pieces)]
    return SplitLayer(parts, widths, 1 if conv else -1)


def part_like(layer: Any, weight: Tensor, bias: bool) -> nn.Module:
    """A layer of the geometry of `layer` over the input channels of `weight`."""
    from stepquant.core.mapped import alike  # which loading has no use for

    has_bias = bias and layer.bias is not None
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            part: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias)
        else:
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            geometry = {name: getattr(layer, name) for name in names}
            part = type(layer)(weight.shape[1], weight.shape[0], bias=has_bias, **geometry)
    part.weight = alike(layer.weight, weight)  # type: ignore[assignment]
    if has_bias:
        part.bias = layer.bias
    return part.train(layer.training)


def split_concats(model: nn.Module, splits: Mapping[str, tuple[int, ...]]) -> Callable[[], None]:
    """Split the layers at these paths in place; calling the result puts the whole layers back."""
    former = {path: find(model, path) for path in splits}
    for path, widths in splits.items():
        model.set_submodule(path, split_layer(former[path], widths, path))

    def unsplit() -> None:
        for path, layer in former.items():
            model.set_submodule(path, layer)

    return unsplit


def find(model: nn.Module, path: str) -> nn.Module:
    """The part of `model` at a path that was read from somewhere."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"the model has no part '{path}'",
            where=type(model).__name__,
            fix="its description belongs to another model, or was edited",
        ) from error
