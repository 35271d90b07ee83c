"""Channels that an embedding of the step makes large on their way from a norm to the layers that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.models import normalization, resnet
from torch import Tensor, nn

ZERO = (normalization.AdaLayerNormZero, normalization.SD35AdaLayerNormZeroX)
SCALES = (normalization.AdaLayerNormZeroSingle, *ZERO)
SELF, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class ScaledChannels:
    """What `readers` read is a norm's output, times 1 + part `part` of what `embedding` returns; or, with `groups`, a
    norm over so many groups of a feature to which that was added, and the positive side of it."""

    embedding: str
    readers: tuple[str, ...]
    part: int = 0
    parts: int = 1
    groups: int = 0
    eps: float = 0.0

    def size(self, embedded: Tensor) -> Tensor:
        """How large the embedding makes each channel, (rows, channels); below 1 it makes it small."""
        own = (
            embedded.detach().float().reshape(-1, self.parts, embedded.shape[-1] // self.parts)[:, self.part]
        )
        if self.groups:
            return F.group_norm(own[..., None], self.groups, eps=self.eps)[..., 0]
        return (1 + own).abs()


def scaled_channels(model: nn.Module) -> list[ScaledChannels]:
    """Of residual blocks that an embedding enters, and of transformer blocks whose norms it scales."""
    modules = dict(model.named_modules())
    found = [one for path, module in modules.items() for one in scaled_in(path, module)]
    known = [one for one in found if one.embedding in modules]
    return [one for one in known if all(reader in modules for reader in one.readers)]


def scaled_in(path: str, module: nn.Module) -> Iterator[ScaledChannels]:
    if isinstance(module, resnet.ResnetBlock2D):
        yield from of_residual(path, module)
    norm, context, single = (getattr(module, name, None) for name in ("norm1", "norm1_context", "norm"))
    inner = "attn1" if hasattr(module, "attn1") else "attn"
    if isinstance(norm, ZERO):
        parts = 9 if isinstance(norm, normalization.SD35AdaLayerNormZeroX) else 6
        yield scaled(path, "norm1", inner, SELF, 1, parts)
        yield ScaledChannels(f"{path}.norm1.linear", (f"{path}.ff.net.0.proj",), 4, parts)
    if isinstance(context, normalization.AdaLayerNormZero):
        yield scaled(path, "norm1_context", inner, ADDED, 1, 6)
        yield ScaledChannels(f"{path}.norm1_context.linear", (f"{path}.ff_context.net.0.proj",), 4, 6)
    if isinstance(single, normalization.AdaLayerNormZeroSingle):
        both = scaled(path, "norm", inner, SELF, 1, 3)
        yield ScaledChannels(both.embedding, (*both.readers, f"{path}.proj_mlp"), 1, 3)


def scaled(
    path: str, norm: str, attention: str, names: tuple[str, ...], part: int, parts: int
) -> ScaledChannels:
    return ScaledChannels(
        f"{path}.{norm}.linear", tuple(f"{path}.{attention}.{name}" for name in names), part, parts
    )


def of_residual(path: str, module: resnet.ResnetBlock2D) -> Iterator[ScaledChannels]:
    """The second convolution reads SiLU(norm2(h + embedding)), or SiLU(norm2(h) (1 + scale) + shift)."""
    if module.time_emb_proj is None or not isinstance(module.norm2, nn.GroupNorm):
        return
    names = f"{path}.time_emb_proj", (f"{path}.conv2",)
    if module.time_embedding_norm == "scale_shift":
        yield ScaledChannels(*names, 0, 2)
    elif module.time_embedding_norm == "default":
        yield ScaledChannels(*names, groups=module.norm2.num_groups, eps=module.norm2.eps)
