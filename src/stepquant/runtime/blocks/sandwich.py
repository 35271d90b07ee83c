"""Fused blocks with an RMS norm on both sides of each branch: the first writes codes, the second joins the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepquant.models.blocks.root_norm import gain
from stepquant.runtime import ops
from stepquant.runtime.blocks.feed import FeedForward
from stepquant.runtime.blocks.modulated import Modulated, made, normed
from stepquant.runtime.blocks.root_norm import DTYPES


class Sandwich(Modulated):
    """What follows t scales the first norms, and gates the second ones; blocks over a text have neither."""

    norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")

    def fused(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if noise_mask is not None or self.leaves_out(x):
            return self.unfused(x, attn_mask, freqs_cis, adaln_input, noise_mask, *args, **kwargs)  # type: ignore[no-any-return]
        modulation = self.module.adaLN_modulation(adaln_input) if self.module.modulation else None
        return self.stream(x, modulation, attention_mask=attn_mask, freqs_cis=freqs_cis)

    def leaves_out(self, x: Tensor) -> bool:
        """Whether the block is asked for what only its own class does."""
        return x.dim() != 3 or x.dtype not in DTYPES or self.changed()

    def stream(self, x: Tensor, modulation: Tensor | None, **kwargs: Any) -> Tensor:
        """The stream behind attention and feed-forward."""
        chunks = [None] * 4 if modulation is None else modulation.chunk(4, dim=-1)
        scale, gate, feed_scale, feed_gate = chunks
        before, *norms = (self.norm(name) for name in self.norms)
        (attention,), (feed,) = self.attentions, self.feeds
        attention.shared[0].dtype = x.dtype
        rows = normed(x, before, attention.code(), scale)
        mixed = attention.module(rows, **self.given(rows), **kwargs)
        return behind(x, mixed, feed, norms, (gate, feed_scale, feed_gate))

    def norm(self, name: str) -> Any:
        return getattr(self.module, name)

    def given(self, rows: Tensor) -> dict[str, Tensor]:
        """What the attention takes beside its input."""
        return {}


class ZeroSandwich(Sandwich):
    """The first norm brings what follows t, and the attention is told to read what it reads."""

    norms = ("norm1", "norm2", "ffn_norm1", "ffn_norm2")

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        image_rotary_emb: Tensor | None,
        temb: Tensor | None = None,
    ) -> Tensor:
        x, first = hidden_states, self.module.norm1
        if self.leaves_out(x):
            return self.unfused(x, attention_mask, image_rotary_emb, temb)  # type: ignore[no-any-return]
        modulation = first.linear(first.silu(temb)) if self.module.modulation else None
        return self.stream(x, modulation, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)

    def norm(self, name: str) -> Any:
        norm = super().norm(name)
        return norm.norm if name == "norm1" and self.module.modulation else norm

    def given(self, rows: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": rows}


class JointSandwich(Modulated):
    """An image and a text beside each other, joined in one attention; nothing follows from a last block's text."""

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        encoder_attention_mask: Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        x, text, mask, block = hidden_states, encoder_hidden_states, encoder_attention_mask, self.module
        if x.dim() != 3 or x.dtype not in DTYPES or self.changed():
            return self.unfused(x, text, temb, mask, image_rotary_emb)  # type: ignore[no-any-return]
        (attention,), context = self.attentions, block.norm1_context
        scale, *of_image = made(block.norm1, temb, 4)
        if block.context_pre_only:
            norm, text_scale = context.norm.norm, context.linear_1(context.silu(temb))
        else:
            norm, (text_scale, *of_text) = context.norm, made(context, temb, 4)
        attention.shared[0].dtype, attention.shared[-1].dtype = x.dtype, text.dtype
        mixed, mixed_text = attention.module(
            normed(x, block.norm1.norm, attention.code(), scale),
            encoder_hidden_states=normed(text, norm, attention.code(1), text_scale),
            attention_mask=mask,
            image_rotary_emb=image_rotary_emb,
        )
        norms = [one.norm for one in (block.norm2, block.norm3, block.norm4)]
        x = behind(x, mixed, self.feeds[0], norms, of_image)
        if block.context_pre_only:
            return x, text
        norms = [one.norm for one in (block.norm2_context, block.norm3_context, block.norm4_context)]
        return x, behind(text, mixed_text, self.feeds[1], norms, of_text)


SANDWICHES: dict[str, type[Modulated]] = {
    "sandwich": Sandwich,
    "zero_sandwich": ZeroSandwich,
    "joint_sandwich": JointSandwich,
}


def behind(
    x: Tensor, mixed: Tensor, feed: FeedForward, norms: Sequence[Any], modulation: Sequence[Tensor | None]
) -> Tensor:
    """The stream behind what an attention has mixed, and behind a feed-forward: norms stand behind both, and one between."""
    gate, scale, feed_gate = modulation
    x = onto(x, mixed, norms[0], gate)
    fed = feed.of(normed(x, norms[1], feed.code(), scale), x.dtype)
    return onto(x, fed, norms[2], feed_gate)


def onto(x: Tensor, branch: Tensor, norm: Any, gate: Tensor | None) -> Tensor:
    """The stream, joined by a branch that is normed and gated."""
    return ops.rms_norm(branch, gain(norm), norm.eps, x.dtype, None if gate is None else gate.tanh(), x)
