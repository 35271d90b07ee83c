"""Attention of transformers, whose processor runs as it is while its projections share what they read."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import attention_processor
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.transformers.transformer_krea2 import Krea2Attention
from torch import nn

from stepquant.models.attention import given

KINDS = (attention_processor.Attention, attention_processor.MochiAttention, AttentionModuleMixin)
OWN = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclass(frozen=True)
class JoinedAttention:
    """Projections that are called one after the other with the same tensor, and what is called last."""

    path: str
    groups: tuple[tuple[str, ...], ...]
    ends: tuple[str, ...]


@dataclass(frozen=True)
class LinearAttention(JoinedAttention):
    """relu(q) (relu(k)^T v), over what each query sums of relu(k): as many steps as there are tokens."""

    heads: int


def joined_attention(path: str, module: nn.Module) -> JoinedAttention | None:
    """None where nothing is shared."""
    if not isinstance(module, KINDS):
        return None
    crosses = bool(getattr(module, "is_cross_attention", False))
    apart = crosses and getattr(module, "added_kv_proj_dim", None) is None
    alone = (*OWN, "to_gate") if type(module) is Krea2Attention else OWN
    own = (OWN[:1], OWN[1:]) if apart else (alone,)
    groups = tuple(group for group in (*own, ADDED) if all(has(module, name) for name in group))
    ends = tuple(name for name in ("to_out.0", "to_add_out") if has(module, name))
    return JoinedAttention(path, groups, ends) if groups else None


def linear_attention(module: nn.Module, joined: JoinedAttention) -> LinearAttention | None:
    """None for everything else."""
    linear = type(given(getattr(module, "processor", None))) is attention_processor.SanaLinearAttnProcessor2_0
    plain = linear and len(joined.groups) == 1 and not getattr(module, "is_cross_attention", False)
    return LinearAttention(joined.path, joined.groups, joined.ends, int(module.heads)) if plain else None  # type: ignore[arg-type]


def has(module: nn.Module, path: str) -> bool:
    """Whether there is such a layer."""
    inner: object = module
    for name in path.split("."):
        inner = getattr(inner, "_modules", {}).get(name)
    return inner is not None
