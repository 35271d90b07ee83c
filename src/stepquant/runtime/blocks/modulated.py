"""Fused blocks with adaptive norms: a norm, its scale and shift write codes; gate and stream join in the last product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.models.blocks.modulated import ModulatedBlock
from stepquant.models.split import SplitLayer
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain, codes_for, run
from stepquant.runtime.blocks.feed import FeedForward, activated
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.ops.code import Code


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

    def fed(
        self, feed: FeedForward, norm: Any, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor
    ) -> Tensor:
        """The stream behind one feed-forward."""
        return feed.of(normed(x, norm, feed.code(), scale, shift), x.dtype, x, gate)

    def attended(self, joined: Joined, rows: Tensor, x: Tensor, gate: Tensor | None, **kwargs: Any) -> Tensor:
        """The stream behind one attention over `rows`, floats or codes."""
        joined.shared[0].dtype = x.dtype
        joined.ends["to_out.0"].onto = x, gate
        return joined.module(rows, **kwargs)  # type: ignore[no-any-return]


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
        attention = self.attentions[0]
        rows = normed(x, first.norm, attention.code(), scale, shift)
        x = self.attended(attention, rows, x, gate, attention_mask=attention_mask)
        return self.fed(self.feeds[0], self.module.norm3, x, rest[1], rest[0], rest[2])


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
        x, block, text = hidden_states, self.module, encoder_hidden_states
        if cross_attention_kwargs or x.dim() != 3 or timestep is None or self.changed():
            given = (attention_mask, text, encoder_attention_mask, timestep, cross_attention_kwargs)
            return self.unfused(x, *given, *args, **kwargs)  # type: ignore[no-any-return]
        table = block.scale_shift_table[None] + timestep.reshape(len(x), 6, -1)
        shift, scale, gate, *rest = table.unbind(1)
        first, second = self.attentions
        rows = normed(x, block.norm1, first.code(), scale, shift)
        x = self.attended(first, rows, x, gate, attention_mask=attention_mask)
        words = {"encoder_hidden_states": text, "attention_mask": encoder_attention_mask}
        x = self.attended(second, x, x, None, **words)
        return self.fed(self.feeds[0], block.norm2, x, rest[1], rest[0], rest[2])


class Joint(Modulated):
    """An image and a text beside each other, joined in one attention."""

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, block = hidden_states, encoder_hidden_states, self.module
        extra = kwargs.get("joint_attention_kwargs") or args
        if extra or x.dim() != 3 or x.dtype == torch.float16 or self.changed():
            return self.unfused(x, text, temb, *args, **kwargs)  # type: ignore[no-any-return]
        rotary = {name: value for name, value in kwargs.items() if name == "image_rotary_emb"}
        dual = self.attentions[1:]
        of_image = self.modulation(block.norm1, temb, 9 if dual else 6)
        last = bool(getattr(block, "context_pre_only", False))
        norms = block.norm1.norm, block.norm2, None if last else block.norm1_context.norm
        if last:
            return self.streams(x, block.norm1_context(text, temb), of_image, None, norms, **rotary)
        of_text = self.modulation(block.norm1_context, temb, 6)
        return self.streams(x, text, of_image, of_text, (*norms, block.norm2_context), **rotary)

    def streams(
        self,
        x: Tensor,
        text: Tensor,
        of_image: tuple[Tensor, ...],
        of_text: tuple[Tensor, ...] | None,
        norms: tuple[Any, ...],
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """Both behind attention and feed-forward; a text that nothing follows from any more is normed already."""
        joint, *dual = self.attentions
        shift, scale, gate = of_image[:3]
        rows = normed(x, norms[0], joint.code(), scale, shift)
        again = normed(x, norms[0], dual[0].code(), of_image[7], of_image[6]) if dual else None
        words = text
        if of_text is not None:
            words = normed(text, norms[2], joint.code(1), of_text[1], of_text[0])
            joint.ends["to_add_out"].onto = text, of_text[2]
        joint.shared[-1].dtype = text.dtype
        x, text = self.attended(joint, rows, x, gate, encoder_hidden_states=words, **kwargs)
        if again is not None:
            x = self.attended(dual[0], again, x, of_image[8])
        x = self.fed(self.feeds[0], norms[1], x, of_image[4], of_image[3], of_image[5])
        if of_text is None:
            return None, x
        return self.fed(self.feeds[1], norms[3], text, of_text[4], of_text[3], of_text[5]), x

    @staticmethod
    def modulation(norm: Any, temb: Tensor, count: int) -> tuple[Tensor, ...]:
        return norm.linear(norm.silu(temb)).chunk(count, dim=1)  # type: ignore[no-any-return]


class Named(Joint):
    """The same with names of its own."""

    def fused(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor | None, Tensor]:
        x, text, block, mask = hidden_states, encoder_hidden_states, self.module, encoder_hidden_states_mask
        extra = joint_attention_kwargs or modulate_index is not None or block.zero_cond_t
        if extra or x.dim() != 3 or x.dtype == torch.float16 or self.changed():
            others = joint_attention_kwargs, modulate_index
            return self.unfused(x, text, mask, temb, image_rotary_emb, *others)  # type: ignore[no-any-return]
        of_image, of_text = (modulate(temb).chunk(6, dim=1) for modulate in (block.img_mod, block.txt_mod))
        norms = block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2
        given = {"encoder_hidden_states_mask": mask, "image_rotary_emb": image_rotary_emb}
        return self.streams(x, text, of_image, of_text, norms, **given)


class Wide(Modulated):
    """Blocks of one stream: an attention and a feed-forward read the same norm, and end in the same layer."""

    def __init__(self, module: Any, *args: Any) -> None:
        super().__init__(module, *args)
        self.attentions[0].set_beside(module.proj_mlp)

    def fused(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        x, text, block, (attention,) = hidden_states, encoder_hidden_states, self.module, self.attentions
        code = attention.code()
        extra = kwargs.get("joint_attention_kwargs") or args or code is None
        if extra or x.dtype == torch.float16 or self.changed():
            return self.unfused(x, text, temb, *args, **kwargs)
        shift, scale, gate = Joint.modulation(block.norm, temb, 3)
        x = torch.cat([text, x], 1)
        rows = normed(x, block.norm.norm, code, scale, shift)
        attention.shared[0].dtype = x.dtype
        mixed = attention.module(rows, image_rotary_emb=kwargs.get("image_rotary_emb"))
        wide = attention.shared[0].beside(rows)
        out = self.narrowed(block.proj_out, mixed, wide, x, gate)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]

    @staticmethod
    def narrowed(layer: Any, mixed: Tensor, wide: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        if isinstance(layer, SplitLayer):
            first, second = layer.children()
            x = run(first, codes_for(first, mixed), x.dtype, x, gate)
            return run(second, activated(wide, "gelu_tanh", second), x.dtype, x, gate)
        joined = torch.cat([codes_for(layer, mixed), activated(wide, "gelu_tanh", layer)], -1)
        return run(layer, joined, x.dtype, x, gate)


class Float32(Modulated):
    """Norms and gates in float32, attention to the image itself and to a text."""

    def fused(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        x, text, block = hidden_states, encoder_hidden_states, self.module
        if temb.dim() != 3 or x.dim() != 3 or self.changed():
            return self.unfused(x, text, temb, rotary_emb)  # type: ignore[no-any-return]
        shift, scale, gate, *rest = (block.scale_shift_table + temb.float()).unbind(1)
        first, second = self.attentions
        rows = normed(x, block.norm1, first.code(), scale, shift)
        x = self.attended(first, rows, x, gate, rotary_emb=rotary_emb)
        rows = x if isinstance(block.norm2, nn.Identity) else normed(x, block.norm2, second.code())
        x = self.attended(second, rows, x, None, encoder_hidden_states=text)
        return self.fed(self.feeds[0], block.norm3, x, rest[1], rest[0], rest[2])


KINDS: dict[str, type[Modulated]] = {
    "zero": Zero,
    "single": Single,
    "joint": Joint,
    "named": Named,
    "wide": Wide,
    "float32": Float32,
}


def normed(
    x: Tensor, norm: Any, code: Code | None, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """The layer norm of each sample, scaled and shifted; codes where those who read it agree on them."""
    if code is None:
        y = norm(x)
        y = y if scale is None else y * (1 + scale[:, None])
        return (y if shift is None else y + shift[:, None]).to(x.dtype)  # type: ignore[no-any-return]
    return ops.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, code, scale, shift)
