"""Fused blocks that are called as diffusers' BasicTransformerBlock is: attentions and a feed-forward, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stepquant.runtime.blocks.modulated import Branch, Modulated, made

Given = Mapping[str, Any]  # what an attention is handed beside its rows


class Bare(Modulated):
    """Called as diffusers' BasicTransformerBlock is, with norms alone: nothing of t enters, but in the kinds below."""

    timed = False  # whether it cannot do without t

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x, text, t = hidden_states, encoder_hidden_states, timestep
        if cross_attention_kwargs or x.dim() != 3 or (self.timed and t is None) or self.changed():
            given = (attention_mask, text, encoder_attention_mask, t, cross_attention_kwargs, class_labels)
            return self.unfused(x, *given, *args, **kwargs)  # type: ignore[no-any-return]
        of_text = {"encoder_hidden_states": text, "attention_mask": encoder_attention_mask}
        return self.through(
            x, *self.branches(x, {"attention_mask": attention_mask}, of_text, t, class_labels)
        )

    def branches(
        self, x: Tensor, own: Given, of_text: Given, t: Any = None, labels: Any = None
    ) -> list[Branch]:
        block = self.module
        read = [Branch(block.norm1, given=own), Branch(block.norm2, given=of_text)]
        return [*read[: len(self.attentions)], Branch(block.norm3)]


class Placed(Bare):
    """Numbers of their places are added to tokens behind the norms of attentions."""

    def behind(self, x: Tensor, *branches: Branch) -> Tensor:
        for attention, branch in zip(self.attentions, branches):
            x = self.attended(attention, self.module.pos_embed(branch.norm(x)), x, None, **branch.given)
        return x


class BareTurned(Bare):
    """Angles of their places turn the queries and keys of the first attention."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        rotary_embedding: Any = None,
    ) -> Tensor:
        x, text, mask = hidden_states, encoder_hidden_states, encoder_attention_mask
        if x.dim() != 3 or self.changed():
            return self.unfused(x, attention_mask, text, mask, rotary_embedding)  # type: ignore[no-any-return]
        own = {"attention_mask": attention_mask, "rotary_emb": rotary_embedding}
        return self.through(
            x, *self.branches(x, own, {"encoder_hidden_states": text, "attention_mask": mask})
        )


class Zero(Bare):
    """Everything about t comes out of the first norm."""

    def branches(
        self, x: Tensor, own: Given, of_text: Given, t: Any = None, labels: Any = None
    ) -> list[Branch]:
        first = self.module.norm1
        emb = first.emb(t, labels, hidden_dtype=x.dtype)
        shift, scale, gate, *rest = made(first, emb, 6)
        return [Branch(first.norm, (shift, scale, gate), own), Branch(self.module.norm3, rest)]


class Single(Bare):
    """One row of a table for each block is added to what all blocks get of t; a text is read as it is."""

    timed = True

    def branches(
        self, x: Tensor, own: Given, of_text: Given, t: Any = None, labels: Any = None
    ) -> list[Branch]:
        block = self.module
        table = (block.scale_shift_table + t.reshape(len(x), 6, -1)).unbind(1)
        return [Branch(block.norm1, table[:3], own), Branch(given=of_text), Branch(block.norm2, table[3:])]


class Places(Single):
    """The same, whose places are angles."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        x, text, masks = hidden_states, encoder_hidden_states, (attention_mask, encoder_attention_mask)
        if temb is None or x.dim() != 3 or self.changed():
            return self.unfused(x, text, temb, *masks, image_rotary_emb)  # type: ignore[no-any-return]
        own = {"attention_mask": masks[0], "image_rotary_emb": image_rotary_emb}
        of_text = {"encoder_hidden_states": text, "attention_mask": masks[1]}
        return self.through(x, *self.branches(x, own, of_text, temb))


class Root(Single):
    """The same behind RMS norms; t is one number for each sample, or one for each token."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        x, text, mask = hidden_states, encoder_hidden_states, encoder_attention_mask
        if temb.shape[1] != 1 or x.dim() != 3 or len(self.module.scale_shift_table) != 6 or self.changed():
            return self.unfused(x, text, temb, image_rotary_emb, mask)  # type: ignore[no-any-return]
        of_text = {"encoder_hidden_states": text, "attention_mask": mask}
        return self.through(x, *self.branches(x, {"image_rotary_emb": image_rotary_emb}, of_text, temb))


BASIC: dict[str, type[Modulated]] = {
    "bare": Bare,
    "placed": Placed,
    "bare_turned": BareTurned,
    "zero": Zero,
    "single": Single,
    "places": Places,
    "root": Root,
}
