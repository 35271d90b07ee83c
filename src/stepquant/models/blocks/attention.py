"""Attention over the pixels of an image, and what is the same about attention elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models import attention_processor
from torch import nn

from stepquant.models.attention import given


@dataclass(frozen=True)
class AttentionBlock:
    """[group norm ->] q, k, v -> product -> out (+ input), divided by `divisor`, over the pixels of an image."""

    path: str
    normed: bool
    heads: int
    residual: bool
    divisor: float


def is_default_attention(module: nn.Module | None) -> bool:
    """Attention with the default processor and nothing between its projections and its product."""
    return (
        type(module) is attention_processor.Attention
        and type(given(module.processor)) is attention_processor.AttnProcessor2_0
        and module.added_kv_proj_dim is None
        and not module.fused_projections
        and all(
            getattr(module, name, None) is None for name in ("spatial_norm", "norm_q", "norm_k", "norm_cross")
        )
    )


def is_plain_attention(module: nn.Module) -> bool:
    """Self-attention over an image."""
    return bool(
        is_default_attention(module)
        and module._from_deprecated_attn_block
        and not module.is_cross_attention
        and (module.group_norm is None or isinstance(module.group_norm, nn.GroupNorm))
    )


def attention_block(path: str, module: nn.Module) -> AttentionBlock:
    return AttentionBlock(
        path,
        normed=module.group_norm is not None,
        heads=int(module.heads),  # type: ignore[arg-type]
        residual=bool(module.residual_connection),
        divisor=float(module.rescale_output_factor),  # type: ignore[arg-type]
    )


def is_bare_attention(module: nn.Module | None) -> bool:
    """Attention over rows of tokens, whose surroundings normalize and add."""
    return bool(
        is_default_attention(module)
        and module.group_norm is None  # type: ignore[union-attr]
        and not module.residual_connection  # type: ignore[union-attr]
        and module.rescale_output_factor == 1.0  # type: ignore[union-attr]
        and module.inner_kv_dim == module.inner_dim  # type: ignore[union-attr]
    )
