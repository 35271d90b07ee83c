"""Keys and values of cross-attention: the same at every step of a generation, so they are computed once for each text."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.runtime import ops
from stepquant.runtime.adapters.present import adapters_in, layer_inside, settings_of
from stepquant.runtime.blocks.attention import Readers
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.layers.offloaded import around, on_disk
from stepquant.runtime.layers.stored import Versions

KEPT_TEXTS = 2  # one with a prompt and one without may take turns


class Kept(NamedTuple):
    text: weakref.ref[Tensor]
    version: int
    pairs: tuple[tuple[Tensor, ...], ...]


class Texts:
    """What every attention to a text makes of it, kept while that very tensor comes back as it was."""

    def __init__(self, root: nn.Module, readers: Sequence[Readers], known: bool) -> None:
        """`root` is the model that they are parts of; `known`: an argument of it is the text, so that whoever replays a call sees when it is another."""
        self.readers = readers
        self.keeps = known and not any(
            getattr(layer_inside(layer), "stepped", False) for one in readers for layer in one.layers
        )
        self.around = around(root, [layer for one in readers for layer in one.layers])
        self.kept: list[Kept] = []
        self.made_by: list[Any] = []  # what the layers had prepared when the texts were kept

    def of(self, text: Any, unchanged: bool = False) -> tuple[tuple[Tensor, ...], ...] | None:
        """Keys and values for each attention; None if they cannot be kept for another call.

        `unchanged`: the layers that make them are known to be.
        """
        if not self.keeps or not isinstance(text, Tensor) or not keepable(text):
            return None
        if not unchanged:
            if any(on_disk(vars(one)) for one in self.around):
                return None
            self.renew()
        version = text._version
        for found in self.kept:
            if found.text() is text and found.version == version:
                return found.pairs
        with torch.inference_mode(False), torch.no_grad():
            pairs = tuple(tuple(project(one, text)) for one in self.readers)
        self.kept = [Kept(weakref.ref(text), version, pairs), *self.kept[: KEPT_TEXTS - 1]]
        return pairs

    def renew(self) -> None:
        """Drop all texts if a layer is another one by now."""
        layers = [layer for one in self.readers for layer in one.layers]
        made_by = [prepared(layer) for layer in layers]
        if made_by != self.made_by:
            self.kept.clear()
            self.made_by = made_by

    def pair(self, index: int, text: Tensor) -> Sequence[Tensor]:
        pairs = self.of(text)
        return project(self.readers[index], text) if pairs is None else pairs[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": []}


def prepared(layer: nn.Module) -> object:
    """What is equal only while the layer computes the same."""
    if isinstance(layer, IntegerLayer):
        return layer.prepared()
    inside, settings = layer_inside(layer), settings_of(adapters_in(layer))
    made = inside.prepared() if isinstance(inside, IntegerLayer) else None
    return [made, Versions.of(layer.parameters()), *settings]


def keepable(text: Tensor) -> bool:
    return (
        type(text) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not text.is_inference()
        and not (text.requires_grad and torch.is_grad_enabled())
    )


def project(readers: Readers, text: Tensor) -> Sequence[Tensor]:
    """Key and value of a text, as rows."""
    code = readers.code()
    dtype = getattr(layer_inside(readers.layers[0]), "emit", None) or text.dtype
    if code is None:  # some layers tell a text's first token from the others
        return [made.flatten(0, -2) for made in readers(text, dtype)]
    return readers(ops.quantize(text.reshape(-1, text.shape[-1]), code), dtype)
