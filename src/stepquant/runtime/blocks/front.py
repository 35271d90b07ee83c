"""Fused blocks of an image and a text in front of it, with norms and gates of their own, and all layers in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepquant.runtime.blocks.joint import asks
from stepquant.runtime.blocks.modulated import Branch, Modulated, Modulation, made, normed


class Front(Modulated):
    """Both norms make what follows t for both."""

    def fused(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        x, text = hidden_states, encoder_hidden_states
        turn = args[0] if args else kwargs.get("image_rotary_emb")
        others = {name: value for name, value in kwargs.items() if name != "image_rotary_emb"}
        if asks(*args[1:], *others.values()) or self.leaves_out(x):
            return self.unfused(x, text, temb, *args, **kwargs)  # type: ignore[no-any-return]
        return self.streams(x, text, *self.modulations(temb), turn)

    def modulations(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        """Shift, scale and gate of attention and feed-forward, of the image and of the text."""
        first, second = (made(norm, temb, 6) for norm in (self.module.norm1, self.module.norm2))
        return (*first[:3], *second[:3]), (*first[3:], *second[3:])

    def norms(self) -> tuple[Any, ...]:
        """Before attention and feed-forward, of the image and of the text."""
        first, second = self.module.norm1.norm, self.module.norm2.norm
        return first, second, first, second

    def streams(
        self, x: Tensor, text: Tensor, of_image: Modulation, of_text: Modulation, turn: Any
    ) -> tuple[Tensor, Tensor]:
        """Both behind attention and feed-forward."""
        (attention,), (feed,), norms = self.attentions, self.feeds, self.norms()
        rows = normed(x, norms[0], attention.code(), of_image[1], of_image[0])
        words = normed(text, norms[2], attention.code(), of_text[1], of_text[0])
        attention.shared[0].dtype = x.dtype
        attention.ends["to_out.0"].streams = ((text, of_text[2]), (x, of_image[2]))
        given = {} if turn is None else {"image_rotary_emb": turn}
        x, text = attention.module(rows, encoder_hidden_states=words, **given)
        x = self.fed(feed, x, Branch(norms[1], of_image[3:]))
        return x, self.fed(feed, text, Branch(norms[3], of_text[3:]))


class FrontHalves(Front):
    """One layer makes what follows t, first that of the image; there are no angles."""

    def fused(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, emb: Tensor
    ) -> tuple[Tensor, Tensor]:
        return super().fused(hidden_states, encoder_hidden_states, emb)

    def modulations(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        chunks = made(self.module.norm1, temb, 12)
        return chunks[:6], chunks[6:]

    def norms(self) -> tuple[Any, ...]:
        block = self.module
        return block.norm1.norm_x, block.norm2, block.norm1.norm_c, block.norm2_context


class FrontTurns(Front):
    """One layer makes what follows t, of the image and of the text by turns."""

    def modulations(self, temb: Tensor) -> tuple[Modulation, Modulation]:
        chunks = self.module.norm1.linear(temb).chunk(12, dim=1)
        return chunks[::2], chunks[1::2]

    def norms(self) -> tuple[Any, ...]:
        block = self.module
        return block.norm1.norm, block.norm2, block.norm1.norm_context, block.norm2_context


FRONT: dict[str, type[Modulated]] = {
    "front": Front,
    "front_halves": FrontHalves,
    "front_turns": FrontTurns,
}
