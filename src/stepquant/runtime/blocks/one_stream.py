"""Fused blocks of one stream: attentions and a feed-forward, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.runtime.blocks.basic import Given, Single
from stepquant.runtime.blocks.chain import kernel_of, run
from stepquant.runtime.blocks.modulated import Branch, Modulated, made, normed


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


class Start(Modulated):
    """Its feed-forward joins what the block was given."""

    def fused(self, hidden_states: Tensor, temb: Tensor, attention_kwargs: Any = None) -> Tensor:
        x, first = hidden_states, self.module.norm1
        if attention_kwargs or x.dim() != 3 or self.changed():
            return self.unfused(x, temb, attention_kwargs)  # type: ignore[no-any-return]
        shift, scale, gate, *rest = made(first, temb, 6)
        (attention,), (feed,) = self.attentions, self.feeds
        mixed = self.attended(attention, normed(x, first.norm, attention.code(), scale, shift), x, gate)
        return self.fed(feed, mixed, Branch(self.module.norm2, rest), x)


class ScaleFirst(Modulated):
    """RMS norms; a table of each block is added to what all blocks get of t, scales before shifts."""

    def fused(
        self, hidden_states: Tensor, temb: Tensor, image_rotary_emb: Any, attention_mask: Tensor | None = None
    ) -> Tensor:
        x, turn, mask, block = hidden_states, image_rotary_emb, attention_mask, self.module
        if temb.shape[1] != 1 or x.dim() != 3 or self.changed():
            return self.unfused(x, temb, turn, mask)  # type: ignore[no-any-return]
        table = (temb.reshape(len(temb), 6, -1) + block.scale_shift_table).unbind(1)
        scale, shift, gate, feed_scale, feed_shift, feed_gate = table
        own = {"image_rotary_emb": turn, "attention_mask": mask}
        first = Branch(block.norm1, (shift, scale, gate), own)
        return self.through(x, first, Branch(block.norm2, (feed_shift, feed_scale, feed_gate)))


class Alone(Modulated):
    """One attention and a feed-forward behind norms, without t, places or a text."""

    def fused(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, mask, block = hidden_states, attention_mask, self.module
        if x.dim() != 3 or self.changed():
            return self.unfused(x, mask)  # type: ignore[no-any-return]
        return self.through(x, Branch(block.norm1, given={"attention_mask": mask}), Branch(block.norm2))


class Shifted(Modulated):
    """What follows t is added to the first norm, and nothing is gated; later blocks read what earlier ones have left."""

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        x, text, block, turn = hidden_states, encoder_hidden_states, self.module, image_rotary_emb
        if temb is None or x.dim() != 3 or self.changed():
            return self.unfused(x, text, temb, turn, skip)  # type: ignore[no-any-return]
        if skip is not None:
            kernel, both = kernel_of(block.skip_linear), torch.cat([x, skip], -1)
            rows = normed(both, block.skip_norm, None if kernel is None else kernel.code)
            x = run(block.skip_linear, rows, x.dtype)
        first = block.norm1
        shift = first.linear(first.silu(temb.float()).to(temb.dtype))
        own = {"image_rotary_emb": turn}
        return self.through(
            x,
            Branch(first.norm, (shift, None, None), own),
            Branch(block.norm2, given=own | {"encoder_hidden_states": text}),
            Branch(block.norm3),
        )


class Image(Single):
    """Like `Single`, whose feed-forward is over the pixels of an image; no mask says which of them there are."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int = 0,
        width: int = 0,
    ) -> Tensor:
        x, text, mask, t = hidden_states, encoder_hidden_states, encoder_attention_mask, timestep
        if t is None or self.leaves_out(x):
            return self.unfused(x, attention_mask, text, mask, t, height, width)  # type: ignore[no-any-return]
        of_text = {"encoder_hidden_states": text, "attention_mask": mask}
        *read, last = self.branches(x, {}, of_text, t)
        x = self.behind(x, *read)
        (feed,), (shift, scale, gate) = self.feeds, last.modulation
        rows = normed(x, last.norm, feed.code(), scale, shift)
        fed = feed.of(rows.unflatten(1, (height, width)).permute(0, 3, 1, 2), x.dtype)
        return torch.addcmul(x, fed.flatten(2).mT, gate[:, None].to(x.dtype))  # type: ignore[index]


class Frames(Modulated):
    """A feed-forward stands in front of the attentions, too; both join the stream where that is as wide as they are."""

    def fused(
        self, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        x, text, block = hidden_states, encoder_hidden_states, self.module
        if x.dim() != 3 or self.changed():
            return self.unfused(x, num_frames, text)  # type: ignore[no-any-return]
        tokens, (first, last) = x.shape[1], self.feeds
        x = x.unflatten(0, (-1, num_frames)).transpose(1, 2).flatten(0, 1)
        x = first.of(normed(x, block.norm_in, first.code()), x.dtype, x if block.is_res else None)
        x = self.behind(x, Branch(block.norm1), Branch(block.norm2, given={"encoder_hidden_states": text}))
        x = last.of(normed(x, block.norm3, last.code()), x.dtype, x if block.is_res else None)
        return x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


ONE_STREAM: dict[str, type[Modulated]] = {
    "float32": Float32,
    "controlled": Controlled,
    "thrice": Thrice,
    "start": Start,
    "scale_first": ScaleFirst,
    "alone": Alone,
    "shifted": Shifted,
    "image": Image,
    "frames": Frames,
}
