"""Fused blocks of one stream: attentions and a feed-forward, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepquant.runtime.blocks.modulated import Branch, Modulated

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


class Zero(Bare):
    """Everything about t comes out of the first norm."""

    def branches(
        self, x: Tensor, own: Given, of_text: Given, t: Any = None, labels: Any = None
    ) -> list[Branch]:
        first = self.module.norm1
        emb = first.emb(t, labels, hidden_dtype=x.dtype)
        shift, scale, gate, *rest = first.linear(first.silu(emb)).chunk(6, dim=1)
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


class Float32(Modulated):
    """Norms and gates in float32, attention to the image itself and to a text."""

    def fused(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any, *mask: Any
    ) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        if temb.dim() != 3 or x.dim() != 3 or self.changed():
            return self.unfused(x, text, temb, rotary_emb, *mask)  # type: ignore[no-any-return]
        return self.from_table(
            x, text, temb, {"rotary_emb": rotary_emb} | dict(zip(("attention_mask",), mask))
        )

    def from_table(self, x: Tensor, text: Tensor, temb: Tensor, own: Given) -> Tensor:
        block = self.module
        table = (block.scale_shift_table + temb.float()).unbind(1)
        second = None if isinstance(block.norm2, nn.Identity) else block.norm2
        first, of_text = Branch(block.norm1, table[:3], own), {"encoder_hidden_states": text}
        return self.through(x, first, Branch(second, given=of_text), Branch(block.norm3, table[3:]))


class Controlled(Float32):
    """The same over a stream beside the image, which hands on what is added to that."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, control, block = hidden_states, encoder_hidden_states, control_hidden_states, self.module
        if temb.dim() != 3 or control.dim() != 3 or self.changed():
            return self.unfused(x, text, control, temb, rotary_emb)  # type: ignore[no-any-return]
        control = control if block.proj_in is None else block.proj_in(control) + x
        control = self.from_table(control, text, temb, {"rotary_emb": rotary_emb})
        return None if block.proj_out is None else block.proj_out(control), control


class Thrice(Modulated):
    """Each branch has two layers of its own that make scale, shift and gate."""

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        embedded_timestep: Tensor,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        extra_pos_emb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, text, block, extra = hidden_states, encoder_hidden_states, self.module, extra_pos_emb
        plain = block.before_proj is None and block.after_proj is None and embedded_timestep.dim() == 2
        if not plain or any(one is not None for one in (*args, *kwargs.values())) or self.changed():
            given = (temb, image_rotary_emb, extra, attention_mask)
            return self.unfused(x, text, embedded_timestep, *given, *args, **kwargs)
        of_text = {"encoder_hidden_states": text, "attention_mask": attention_mask}
        given_to: tuple[dict[str, Any], ...] = ({"image_rotary_emb": image_rotary_emb}, of_text, {})
        norms = block.norm1, block.norm2, block.norm3
        branches = [
            Branch(norm.norm, self.modulation(norm, embedded_timestep, temb), given)
            for norm, given in zip(norms, given_to)
        ]
        return self.through(x if extra is None else x + extra, *branches)

    @staticmethod
    def modulation(norm: Any, embedded: Tensor, temb: Tensor | None) -> tuple[Tensor, ...]:
        made = norm.linear_2(norm.linear_1(norm.activation(embedded)))
        return (made if temb is None else made + temb).chunk(3, dim=-1)  # type: ignore[no-any-return]


class BareTurned(Bare):
    """The same, whose places are angles."""

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


ONE_STREAM: dict[str, type[Modulated]] = {
    "zero": Zero,
    "single": Single,
    "places": Places,
    "root": Root,
    "float32": Float32,
    "controlled": Controlled,
    "thrice": Thrice,
    "bare": Bare,
    "bare_turned": BareTurned,
}
