"""Fused blocks with an RMS norm on both sides of each branch: the first writes codes, the second joins the stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepquant.runtime import ops
from stepquant.runtime.blocks.modulated import Modulated, normed
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
        before, behind, feed_before, feed_behind = (self.norm(name) for name in self.norms)
        (attention,), (feed,) = self.attentions, self.feeds
        attention.shared[0].dtype = x.dtype
        rows = normed(x, before, attention.code(), scale)
        mixed = attention.module(rows, **self.given(rows), **kwargs)
        x = onto(x, mixed, behind, gate)
        fed = feed.of(normed(x, feed_before, feed.code(), feed_scale), x.dtype)
        return onto(x, fed, feed_behind, feed_gate)

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


SANDWICHES: dict[str, type[Modulated]] = {"sandwich": Sandwich, "zero_sandwich": ZeroSandwich}


def onto(x: Tensor, branch: Tensor, norm: Any, gate: Tensor | None) -> Tensor:
    """The stream, joined by a branch that is normed and gated."""
    return ops.rms_norm(branch, norm.weight, norm.eps, x.dtype, None if gate is None else gate.tanh(), x)
