"""Attention beside a feed-forward, which reads what it reads and ends in the same layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.models.blocks.modulated import ModulatedBlock
from stepquant.models.blocks.root_norm import gain
from stepquant.models.split import SplitLayer
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain, codes_for, kernel_of, run
from stepquant.runtime.blocks.feed import FeedForward, activated
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.blocks.joint import asks, by_token, of_pairs
from stepquant.runtime.blocks.modulated import Modulated, Modulation, made, normed
from stepquant.runtime.blocks.root_norm import DTYPES
from stepquant.runtime.blocks.rotary import Angles, multiplied, multiplies_codes
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.ops.code import Code


class Parallel(Chain):
    """Two layers in all: by itself, or inside a block that hands it codes and a gate."""

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
                one.unflatten(-1, (-1, module.head_dim)), gain(norm), norm.eps, False, *angles, False, code
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


class Wide(Modulated):
    """The text stands in front of the image."""

    def __init__(
        self, module: Any, declared: ModulatedBlock, attentions: list[Joined], feeds: list[FeedForward]
    ) -> None:
        super().__init__(module, declared, attentions, feeds)
        self.attentions[0].set_beside(module.proj_mlp)

    def fused(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        x, text, words = hidden_states, encoder_hidden_states, encoder_hidden_states.shape[1]
        others = {name: value for name, value in kwargs.items() if name != "image_rotary_emb"}
        if args or asks(*others.values()) or self.leaves_out(x):
            return self.unfused(x, text, temb, *args, **kwargs)
        given = {"image_rotary_emb": kwargs.get("image_rotary_emb")}
        out = self.stream(torch.cat([text, x], 1), made(self.module.norm, temb, 3), **given)
        return out[:, :words], out[:, words:]

    def leaves_out(self, x: Tensor) -> bool:
        return self.attentions[0].code() is None or x.dtype == torch.float16 or self.changed()

    def stream(self, x: Tensor, modulation: Modulation, **kwargs: Any) -> Tensor:
        """The stream behind both."""
        (shift, scale, gate), attention, block = modulation, self.attentions[0], self.module
        rows = normed(x, block.norm.norm, attention.code(), scale, shift)
        attention.shared[0].dtype = x.dtype
        mixed = self.mixed(rows, **kwargs)
        wide = attention.shared[0].beside(rows)
        return narrowed(block.proj_out, mixed, wide, "gelu_tanh", x, gate)

    def mixed(self, rows: Tensor, **kwargs: Any) -> Tensor:
        return self.attentions[0].module(rows, **kwargs)  # type: ignore[no-any-return]


class WideBehind(Wide):
    """The text stands behind the image, under a mask."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, text, mask, patches = hidden_states, encoder_hidden_states, attention_mask, hidden_states.shape[1]
        if kwargs or self.leaves_out(x):
            return self.unfused(x, text, temb, mask, image_rotary_emb, *args, **kwargs)
        given = {"patches": patches, "attention_mask": mask, "image_rotary_emb": image_rotary_emb}
        out = self.stream(torch.cat([x, text], 1), made(self.module.norm, temb, 3), **given)
        return out[:, :patches], out[:, patches:]

    def mixed(self, rows: Tensor, *, patches: int, **kwargs: Any) -> Tensor:  # type: ignore[override]
        words = rows[:, patches:]
        return torch.cat(super().mixed(rows[:, :patches], encoder_hidden_states=words, **kwargs), 1)  # type: ignore[arg-type]


class WidePruned(Wide):
    """The text is in the stream already; the block is handed what follows t."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        x, mask = hidden_states, attention_mask
        if joint_attention_kwargs or self.leaves_out(x):
            return self.unfused(x, temb, image_rotary_emb, mask, joint_attention_kwargs)
        given = {"attention_mask": of_pairs(mask), "image_rotary_emb": image_rotary_emb}
        return self.stream(x, temb.unbind(1), **given)


PARALLEL: dict[str, type[Modulated]] = {
    "parallel": ParallelBlock,
    "wide": Wide,
    "wide_behind": WideBehind,
    "wide_pruned": WidePruned,
}


def narrowed(
    layer: Any, mixed: Tensor, wide: Tensor, activation: str, x: Tensor | None, gate: Tensor | None
) -> Tensor:
    """`layer` on an attention and an activation, concatenated; it may have been split into two that are added."""
    if isinstance(layer, SplitLayer):
        first, second = layer.children()
        x = run(first, codes_for(first, mixed), mixed.dtype, x, gate)
        return run(second, activated(wide, activation, second), mixed.dtype, x, gate)
    joined = torch.cat([codes_for(layer, mixed), activated(wide, activation, layer)], -1)
    return run(layer, joined, mixed.dtype, x, gate)
