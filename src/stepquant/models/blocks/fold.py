"""Norms whose shift and scale a layer of the same block makes: what it makes may be multiplied channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusers.models import attention, normalization
from diffusers.models import transformers as networks
from torch import Tensor, nn

from stepquant.models.blocks.feed import feed
from stepquant.models.blocks.joined import ADDED, OWN, has

MLP = 3  # the first chunk behind shift, scale and gate of an attention


class Source(NamedTuple):
    """A layer whose outputs lie in equal chunks, and the places of shift and scale among these."""

    path: str
    shift: int
    scale: int

    def multiplied(self, factors: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        """What its outputs are multiplied by, and what is added to them, so that `factors` multiply (1 + scale) and shift."""
        times, added = factors.new_ones(outputs), factors.new_zeros(outputs)
        for place in (self.shift, self.scale):
            times[place * len(factors) : (place + 1) * len(factors)] = factors
        added[self.scale * len(factors) : (self.scale + 1) * len(factors)] = factors - 1
        return times, added


@dataclass(frozen=True)
class Fold:
    """All layers that read norm(x) (1 + scale) + shift, and where shift and scale come from: of an image and of a text."""

    readers: tuple[str, ...]
    sources: tuple[Source, ...]

    def inside(self, path: str) -> Fold:
        """With the path of the block in front."""
        readers = tuple(f"{path}.{name}" for name in self.readers)
        return Fold(readers, tuple(one._replace(path=f"{path}.{one.path}") for one in self.sources))


def folds(model: nn.Module) -> list[Fold]:
    """Of every block whose modulation is its own: where one is shared by all blocks, none can have its own factors."""
    found = ((path, KINDS.get(type(module)), module) for path, module in model.named_modules())
    return [
        fold.inside(path) for path, kind, module in found if kind for fold in kind(module) if fold.readers
    ]


def zero(block: Any) -> list[Fold]:
    if type(block.norm1) is not normalization.AdaLayerNormZero or block.only_cross_attention:
        return []
    return [attended(block, "attn1", OWN, "norm1.linear"), fed(block, "ff", "norm1.linear")]


def joint(block: Any) -> list[Fold]:
    """An image and a text, each with a norm of its own; that of a last block has the scale first."""
    last = bool(getattr(block, "context_pre_only", False))
    found = [
        attended(block, "attn", OWN, "norm1.linear"),
        fed(block, "ff", "norm1.linear"),
        attended(block, "attn", ADDED, "norm1_context.linear", int(last), int(not last)),
    ]
    found += [] if last else [fed(block, "ff_context", "norm1_context.linear")]
    dual = getattr(block, "attn2", None) is not None
    return [*found, attended(block, "attn2", OWN, "norm1.linear", 6, 7)] if dual else found


def wide(block: Any) -> list[Fold]:
    """A feed-forward beside the attention reads the same norm."""
    one = attended(block, "attn", OWN, "norm.linear")
    return [Fold((*one.readers, "proj_mlp"), one.sources)]


def named(block: Any) -> list[Fold]:
    return [
        attended(block, "attn", OWN, "img_mod.1"),
        fed(block, "img_mlp", "img_mod.1"),
        attended(block, "attn", ADDED, "txt_mod.1"),
        fed(block, "txt_mlp", "txt_mod.1"),
    ]


def together(block: Any) -> list[Fold]:
    """Image and text are read as one list of tokens, behind a norm each."""
    norms = [tuple(Source(f"{name}.linear", at, at + 1) for at in (0, MLP)) for name in ("norm1", "norm2")]
    return [
        Fold(attended(block, "attn1", OWN, "").readers, norms[0]),
        Fold(fed(block, "ff", "").readers, norms[1]),
    ]


def attended(
    block: nn.Module, name: str, layers: tuple[str, ...], source: str, shift: int = 0, scale: int = 1
) -> Fold:
    readers = tuple(f"{name}.{layer}" for layer in layers if has(block, f"{name}.{layer}"))
    return Fold(readers, (Source(source, shift, scale),))


def fed(block: nn.Module, name: str, source: str) -> Fold:
    """Of the feed-forward of this name; no readers where it is of another kind."""
    declared = feed(name, block.get_submodule(name)) if has(block, name) else None
    widen = declared.widen if declared else ()
    return Fold(tuple(f"{name}.{layer}" for layer in widen), (Source(source, MLP, MLP + 1),))


KINDS = {
    attention.BasicTransformerBlock: zero,
    attention.JointTransformerBlock: joint,
    networks.transformer_flux.FluxTransformerBlock: joint,
    networks.transformer_flux.FluxSingleTransformerBlock: wide,
    networks.transformer_hunyuan_video.HunyuanVideoTransformerBlock: joint,
    networks.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock: wide,
    networks.transformer_qwenimage.QwenImageTransformerBlock: named,
    networks.cogvideox_transformer_3d.CogVideoXBlock: together,
}
