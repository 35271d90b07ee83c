"""Fused transformer blocks with self- and cross-attention: each norm and activation writes the codes of the next layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepquant.models.blocks.transformer import ImageTransformer, TextBlock
from stepquant.runtime import ops
from stepquant.runtime.blocks.attention import Mix, Readers
from stepquant.runtime.blocks.chain import Chain, NormThen, addable, codes_for, kernel_of, pixels, run
from stepquant.runtime.blocks.texts import Texts


class Transformer(Chain):
    """Blocks over the pixels of an image between two projections, which may be convolutions or linears."""

    def __init__(self, module: Any, declared: ImageTransformer) -> None:
        super().__init__(module, module.norm, module.proj_in, module.proj_out)
        self.linear = declared.linear
        self.norm = NormThen(module.norm, "none", module.proj_in)
        self.blocks = list(module.transformer_blocks)
        self.enter, self.leave = module.proj_in, module.proj_out

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        masked = attention_mask is not None or encoder_attention_mask is not None
        if args or masked or return_dict or kwargs.get("cross_attention_kwargs") or hidden_states.dim() != 4:
            masks = {"attention_mask": attention_mask, "encoder_attention_mask": encoder_attention_mask}
            return self.unfused(
                hidden_states, encoder_hidden_states, *args, **masks, return_dict=return_dict, **kwargs
            )
        batch, _, height, width = hidden_states.shape
        rows = self.entered(hidden_states).unflatten(0, (batch, height * width))
        for block in self.blocks:
            rows = block(rows, encoder_hidden_states=encoder_hidden_states)
        image = rows.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (self.left(image, hidden_states),)

    def entered(self, x: Tensor) -> Tensor:
        """One row for every pixel."""
        y = self.norm.normed(x)
        return run(self.enter, pixels(y), x.dtype) if self.linear else pixels(run(self.enter, y, x.dtype))

    def left(self, hidden: Tensor, x: Tensor) -> Tensor:
        codes = codes_for(self.leave, hidden)
        if not self.linear:
            return run(self.leave, codes, x.dtype, addable(x, self.leave))
        rows = run(self.leave, pixels(codes), x.dtype, pixels(x))
        batch, _, height, width = hidden.shape
        return rows.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


class Block(Chain):
    """Self-attention, attention to a text and a gated feed-forward, each behind a layer norm and added."""

    def __init__(self, module: Any, declared: TextBlock, texts: Texts, index: int) -> None:
        inside = (module.norm1, module.attn1, module.norm2, module.attn2, module.norm3, module.ff)
        super().__init__(module, *inside)
        self.declared, self.texts, self.index = declared, texts, index
        first, second = module.attn1, module.attn2
        self.own = Readers(first.to_q, first.to_k, first.to_v)
        self.query = Readers(second.to_q)
        self.widen, self.narrow = Readers(module.ff.net[0].proj), module.ff.net[2]
        self.mixes = Mix(first, declared.heads[0]), Mix(second, declared.heads[1])
        self.joints = (self.own, texts.readers[index])

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        masked = attention_mask is not None or encoder_attention_mask is not None
        if masked or cross_attention_kwargs or not isinstance(text, Tensor) or self.changed(x, text):
            masks = (attention_mask, text, encoder_attention_mask)
            return self.unfused(x, *masks, timestep, cross_attention_kwargs, *args, **kwargs)
        batch, tokens, width = x.shape
        rows, block = x.reshape(-1, width), self.module
        own = self.own(normed(rows, block.norm1, self.own), x.dtype)
        rows = self.mixes[0](own, batch, rows)
        (query,) = self.query(normed(rows, block.norm2, self.query), x.dtype)
        rows = self.mixes[1]((query, *self.texts.pair(self.index, text)), batch, rows)
        (wide,) = self.widen(normed(rows, block.norm3, self.widen), x.dtype)
        return run(self.narrow, self.gated(wide), x.dtype, rows).unflatten(0, (batch, tokens))

    def gated(self, wide: Tensor) -> Tensor:
        kernel = kernel_of(self.narrow)
        if kernel is None:
            return ops.activate(wide, "geglu")
        return ops.activation_quantize(wide, "geglu", kernel.code)

    def changed(self, x: Tensor, text: Tensor) -> bool:
        """Whether the block is asked for what only its own class does."""
        return (
            x.dim() != 3
            or text.dim() != 3
            or len(text) != len(x)
            or any(mix.changed() for mix in self.mixes)
            or any(getattr(self.module, name, None) is not None for name in self.declared.unless)
        )

    def state(self) -> list[Any]:
        found = [getattr(self.module, name, None) for name in self.declared.unless]
        return found + [mix.module.processor for mix in self.mixes] + [one.joins for one in self.joints]


def normed(rows: Tensor, norm: Any, readers: Readers) -> Tensor:
    """The layer norm of rows, as codes if all readers take the same."""
    code = readers.code()
    if code is None:
        return norm(rows)  # type: ignore[no-any-return]
    return ops.layer_norm_quantize(rows, norm.weight, norm.bias, norm.eps, code)
