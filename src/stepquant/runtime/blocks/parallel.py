"""Attention beside a feed-forward, which reads what it reads and ends in the same layer: two layers, and one pass each between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.models.blocks.modulated import ModulatedBlock
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain, kernel_of
from stepquant.runtime.blocks.feed import FeedForward
from stepquant.runtime.blocks.joint import by_token, narrowed
from stepquant.runtime.blocks.modulated import Modulated, normed
from stepquant.runtime.blocks.root_norm import DTYPES
from stepquant.runtime.blocks.rotary import Angles, multiplied, multiplies_codes
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.ops.code import Code


class Parallel(Chain):
    """By itself, or inside a block that hands it codes and a gate."""

    def __init__(self, module: Any) -> None:
        inside = (module.to_qkv_mlp_proj, module.norm_q, module.norm_k, module.mlp_act_fn, module.to_out)
        super().__init__(module, *inside)
        self.processor = module.processor

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        x = hidden_states
        if kwargs or x.dim() != 3 or x.dtype not in DTYPES or not self.multiplies_codes():
            return self.unfused(x, attention_mask, image_rotary_emb, **kwargs)  # type: ignore[no-any-return]
        return self.of(self.module.to_qkv_mlp_proj(x), image_rotary_emb, attention_mask)

    def of(
        self,
        made: Tensor,
        turn: Any,
        mask: Tensor | None = None,
        into: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Of what the first layer made; times the gate of each sample, added to `into`."""
        module, inner, angles = self.module, self.module.inner_dim, Angles.of(turn, False)
        query, key, value, wide = made.split([inner] * 3 + [made.shape[-1] - 3 * inner], -1)
        query, key = (
            ops.rms_norm_rotary_quantize(
                one.unflatten(-1, (-1, module.head_dim)), norm.weight, norm.eps, False, *angles, False, code
            ).flatten(2)
            for one, norm, code in zip((query, key), (module.norm_q, module.norm_k), module.product.codes)
        )
        mixed = multiplied(module.product, module.head_dim, query, key, value, mask)
        return narrowed(module.to_out, mixed, wide, "swiglu_first", into, gate)

    def multiplies_codes(self) -> bool:
        return multiplies_codes(self.module, self.processor)

    def ready(self) -> bool:
        """Whether its first layer takes codes."""
        return isinstance(self.module.to_qkv_mlp_proj, IntegerLayer)

    def code(self) -> Code | None:
        """What a norm in front may write; None if the first layer reads floats."""
        kernel = kernel_of(self.module.to_qkv_mlp_proj)
        return None if kernel is None else kernel.code

    def state(self) -> list[Any]:
        return [self.module.processor]


class ParallelBlock(Modulated):
    """One stream, one norm, and a modulation that all blocks share."""

    def __init__(
        self, module: Any, declared: ModulatedBlock, attentions: list[Any], feeds: list[FeedForward]
    ) -> None:
        super().__init__(module, declared, attentions, feeds)
        self.attention: Parallel = attentions[0]

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        x, text, attention, code = hidden_states, encoder_hidden_states, self.attention, self.attention.code()
        plain = code is not None and x.dtype in DTYPES and attention.multiplies_codes()
        if not plain or joint_attention_kwargs or by_token(temb_mod) or self.changed():
            given = (image_rotary_emb, joint_attention_kwargs, split_hidden_states, text_seq_len)
            return self.unfused(x, text, temb_mod, *given)
        if text is not None:
            x, text_seq_len = torch.cat([text, x], 1), text.shape[1]
        shift, scale, gate = temb_mod.flatten(1).chunk(3, dim=1)
        rows = normed(x, self.module.norm, code, scale, shift)
        made = attention.module.to_qkv_mlp_proj.from_codes(rows, x.dtype)
        x = attention.of(made, image_rotary_emb, None, x, gate)
        return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x
