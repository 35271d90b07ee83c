"""Fused blocks with adaptive norms: a norm, its scale and shift write codes; gate and stream join in the last product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.models.blocks.modulated import ModulatedBlock
from stepquant.models.blocks.root_norm import is_plain_root_norm
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.feed import FeedForward
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.ops.code import Code


class Branch(NamedTuple):
    """What stands before and behind an attention or a feed-forward, and what else an attention is given."""

    norm: Any = None
    modulation: Sequence[Tensor | None] = (None, None, None)  # shift, scale and gate
    given: Mapping[str, Any] = {}


class Modulated(Chain):
    """What blocks of all kinds share: branches that start at a modulated norm and end in the stream."""

    def __init__(
        self, module: Any, declared: ModulatedBlock, attentions: list[Joined], feeds: list[FeedForward]
    ) -> None:
        super().__init__(module, *module.children())
        self.declared, self.attentions, self.feeds = declared, attentions, feeds
        self.processors = [one.module.processor for one in attentions]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What it leaves with its attentions for the time of their calls is nothing that a compiler should follow.
        return (
            self.unfused(*args, **kwargs)
            if torch.compiler.is_compiling()
            else super().__call__(*args, **kwargs)
        )

    def changed(self) -> bool:
        """Whether the block is asked for what only its own class does."""
        now = [one.module.processor for one in self.attentions]
        return any(a is not b for a, b in zip(now, self.processors)) or any(
            getattr(self.module, name, None) is not None for name in self.declared.unless
        )

    def state(self) -> list[Any]:
        found = [getattr(self.module, name, None) for name in self.declared.unless]
        return found + [one.module.processor for one in self.attentions]

    def fed(self, feed: FeedForward, x: Tensor, branch: Branch) -> Tensor:
        """The stream behind one feed-forward."""
        shift, scale, gate = branch.modulation
        return feed.of(normed(x, branch.norm, feed.code(), scale, shift), x.dtype, x, gate)

    def attended(self, joined: Joined, rows: Tensor, x: Tensor, gate: Tensor | None, **kwargs: Any) -> Tensor:
        """The stream behind one attention over `rows`, floats or codes."""
        joined.shared[0].dtype = x.dtype
        joined.ends["to_out.0"].onto = x, gate
        return joined.module(rows, **kwargs)  # type: ignore[no-any-return]

    def through(self, x: Tensor, *branches: Branch) -> Tensor:
        """The stream behind all attentions, one after the other, and the feed-forward."""
        for attention, branch in zip(self.attentions, branches):
            shift, scale, gate = branch.modulation
            rows = x if branch.norm is None else normed(x, branch.norm, attention.code(), scale, shift)
            x = self.attended(attention, rows, x, gate, **branch.given)
        return self.fed(self.feeds[0], x, branches[-1])


class Zero(Modulated):
    """Everything about t comes out of the first norm."""

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
        x, first = hidden_states, self.module.norm1
        if cross_attention_kwargs or x.dim() != 3 or self.changed():
            given = (attention_mask, encoder_hidden_states, encoder_attention_mask, timestep)
            return self.unfused(x, *given, cross_attention_kwargs, class_labels, *args, **kwargs)  # type: ignore[no-any-return]
        emb = first.emb(timestep, class_labels, hidden_dtype=x.dtype)
        shift, scale, gate, *rest = first.linear(first.silu(emb)).chunk(6, dim=1)
        own = Branch(first.norm, (shift, scale, gate), {"attention_mask": attention_mask})
        return self.through(x, own, Branch(self.module.norm3, rest))


class Single(Modulated):
    """One row of a table for each block is added to what all blocks get of t."""

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
        if cross_attention_kwargs or x.dim() != 3 or timestep is None or self.changed():
            given = (attention_mask, text, encoder_attention_mask, timestep, cross_attention_kwargs)
            return self.unfused(x, *given, *args, **kwargs)  # type: ignore[no-any-return]
        mask, of_text = {"attention_mask": attention_mask}, {"attention_mask": encoder_attention_mask}
        return self.from_table(
            x, timestep.reshape(len(x), 6, -1), mask, of_text | {"encoder_hidden_states": text}
        )

    def from_table(
        self, x: Tensor, added: Tensor, own: Mapping[str, Any], of_text: Mapping[str, Any]
    ) -> Tensor:
        """What follows t, added to a table: of the attention to itself and of the feed-forward; a text is read as it is."""
        block = self.module
        table = (block.scale_shift_table + added).unbind(1)
        first = Branch(block.norm1, table[:3], own)
        return self.through(x, first, Branch(given=of_text), Branch(block.norm2, table[3:]))


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
        return self.from_table(x, temb.reshape(len(x), 6, -1), own, of_text)


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
        own = {"image_rotary_emb": image_rotary_emb}
        return self.from_table(x, temb.reshape(len(x), 6, -1), own, of_text)


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

    def from_table(self, x: Tensor, text: Tensor, temb: Tensor, own: Mapping[str, Any]) -> Tensor:
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


ONE_STREAM: dict[str, type[Modulated]] = {
    "zero": Zero,
    "single": Single,
    "places": Places,
    "root": Root,
    "float32": Float32,
    "controlled": Controlled,
    "thrice": Thrice,
}


def normed(
    x: Tensor, norm: Any, code: Code | None, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """The layer norm or RMS norm of each sample, scaled and shifted; codes where those who read it agree on them."""
    if code is None:
        y = norm(x)
        y = y if scale is None else y * (1 + scale[:, None])
        return (y if shift is None else y + shift[:, None]).to(x.dtype)  # type: ignore[no-any-return]
    if is_plain_root_norm(norm):
        return ops.rms_norm_quantize(x, norm.weight, norm.eps, code, scale, shift)
    return ops.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, code, scale, shift)
