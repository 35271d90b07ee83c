"""Attention whose queries and keys go from their projections to codes in one pass: normed, and turned by their places."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.models.attention import spread
from stepquant.models.blocks.root_norm import gain
from stepquant.models.blocks.rotary import RotaryAttention
from stepquant.runtime import ops
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.blocks.root_norm import DTYPES
from stepquant.runtime.layers.attention_product import IntegerProduct
from stepquant.runtime.ops.code import Code

READ = (*DTYPES, torch.uint8)  # codes, where a norm in front has made them
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class Angles(NamedTuple):
    """Of every pair of channels of a head, (batch or 1, tokens, pairs); of nothing where nothing is turned."""

    cos: Tensor | None = None
    sin: Tensor | None = None

    @classmethod
    def of(cls, given: Any, halves: bool) -> Angles:
        """From complex numbers, or from cosines and sines that stand at both channels of a pair."""
        if given is None:
            return cls()
        if isinstance(given, Tensor):
            numbers = torch.view_as_real(given if given.dim() == 3 else given[None])
            return cls(numbers[..., 0], numbers[..., 1])
        cos, sin = (one[None] if one.dim() == 2 else one.squeeze(2) for one in given)
        pairs = cos.shape[-1] // 2
        return cls(cos[..., :pairs], sin[..., :pairs]) if halves else cls(cos[..., ::2], sin[..., 1::2])

    def at(self, tokens: slice) -> Angles:
        return Angles(*(None if one is None else one[:, tokens] for one in self))

    def padded(self, tokens: int, front: bool = False) -> Angles:
        """And those of so many tokens behind or in front, which nothing turns."""
        if self.cos is None or self.sin is None:
            return self
        shape = len(self.cos), tokens, self.cos.shape[2]
        still = self.cos.new_ones(shape), self.sin.new_zeros(shape)
        pairs = zip(still, self) if front else zip(self, still)
        return Angles(*(torch.cat(pair, 1) for pair in pairs))  # type: ignore[arg-type]


def multiplies_codes(attention: Any, processor: Any) -> bool:
    """Whether its product is of integers, of operands that nobody else asks for, and its processor is still that one."""
    product = getattr(attention, "product", None)
    return (
        isinstance(product, IntegerProduct)
        and attention.processor is processor
        and product.prepared().reason is None
        and not product.spec.dynamic
        and not product.in_floats
        and not (product._forward_hooks or product._forward_pre_hooks)
    )


def multiplied(
    product: Any, width: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """The product of rows of all heads of so many channels, of which keys and values may have fewer."""
    query, key, value = (one.unflatten(-1, (-1, width)).transpose(1, 2) for one in (query, key, value))
    found: Tensor = product(query, spread(key, query), spread(value, query), mask)
    return found.transpose(1, 2).flatten(2)


class Turned(Joined):
    """Does what the processor does, with codes between the projections and the product."""

    def __init__(self, module: Any, declared: RotaryAttention) -> None:
        super().__init__(module, declared, *(getattr(module, name, None) for name in NORMS))
        self.heads, self.rotary, self.processor = declared.heads, declared.rotary, module.processor

    def inside(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        x, text, mask, rotary = hidden_states, encoder_hidden_states, attention_mask, self.rotary
        given: dict[str | None, Any] = {name: value for name, value in kwargs.items() if value is not None}
        turn, of_text = given.pop(rotary.angles, args[0] if args else None), given.pop(rotary.text_mask, None)
        known = not given and len(args) <= 1 and (text is not None or not rotary.image)
        known = known and (mask is None or not (rotary.merged and rotary.joint == "front"))
        if (
            not known
            or x.dim() != 3
            or x.dtype not in READ
            or not multiplies_codes(self.module, self.processor)
        ):
            return super().inside(x, text, mask, *args, **kwargs)
        if rotary.text_mask == "attention_mask":
            of_text, mask = mask, None
        if of_text is not None and text is not None:
            parts = [of_text, of_text.new_ones(x.shape[:2])]
            mask = torch.cat(parts if rotary.joint == "front" else parts[::-1], 1)
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()[:, None, None]  # which keys there are
        elif mask is not None and mask.dim() == 3:
            mask = mask[:, None]  # the same for all heads
        if text is not None and rotary.merged and rotary.joint == "front":
            return self.in_front(x, text, turn)
        if text is not None and rotary.merged:
            return self.merged(x, text, turn, mask)
        if text is not None and rotary.joint:
            return self.together(x, text, turn, mask)
        operands = self.own(x, x if text is None else text, Angles.of(turn, rotary.halves))
        mixed = self.multiplied(*operands, mask=mask)
        return self.ended(mixed * self.module.to_gate(x).sigmoid() if rotary.gated else mixed)

    def own(self, x: Tensor, source: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key as codes, and the value."""
        module, codes = self.module, self.module.product.codes
        query = self.coded(module.to_q(x), module.norm_q, angles, codes[0])
        angles = Angles() if self.rotary.crossing and source is not x else angles
        return query, self.coded(module.to_k(source), module.norm_k, angles, codes[1]), module.to_v(source)

    def added(self, text: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a text."""
        module, codes = self.module, self.module.product.codes
        query = self.coded(module.add_q_proj(text), module.norm_added_q, angles, codes[0])
        key = self.coded(module.add_k_proj(text), module.norm_added_k, angles, codes[1])
        return query, key, module.add_v_proj(text)

    @property
    def width(self) -> int:
        """Channels of a head, of which keys and values may have fewer than queries."""
        return int(self.module.to_q.out_features) // self.heads

    def coded(self, rows: Tensor, norm: Any, angles: Angles, code: Code) -> Tensor:
        """(batch, tokens, channels) of all heads."""
        across, halves = self.rotary.across, self.rotary.halves
        heads = rows.unflatten(-1, (1, -1) if self.rotary.wide else (-1, self.width))
        if isinstance(norm, nn.LayerNorm):
            norming = (heads, norm.weight, norm.bias, norm.eps)
            return ops.layer_norm_rotary_quantize(*norming, *angles, halves, code).flatten(2)
        return ops.rms_norm_rotary_quantize(
            heads, gain(norm), norm.eps, across, *angles, halves, code
        ).flatten(2)

    def multiplied(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return multiplied(self.module.product, self.width, query, key, value, mask)

    def merged(self, x: Tensor, text: Tensor, turn: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image and text behind it, with the same projections; the image alone is turned."""
        words, both = text.shape[1], torch.cat([x, text], 1)
        angles = Angles.of(turn, self.rotary.halves).padded(words)
        mixed = self.multiplied(*self.own(both, both, angles), mask=mask)
        image, text = mixed.split([x.shape[1], words], 1)
        return self.ended(image), text

    def in_front(self, x: Tensor, text: Tensor, turn: Any) -> tuple[Tensor, Tensor]:
        """A text in front of the image, with the same projections and the same last layer; the image alone is turned."""
        words, both = text.shape[1], torch.cat([text, x], 1)
        angles = Angles.of(turn, self.rotary.halves).padded(words, front=True)
        mixed = self.multiplied(*self.own(both, both, angles), mask=None)
        if (end := self.ends["to_out.0"]).streams:
            text, image = end.apart(mixed)
            return image, text
        mixed = self.ended(mixed)
        return mixed[:, words:], mixed[:, :words]

    def together(self, x: Tensor, text: Tensor, turn: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image and text, joined in one product."""
        front, words, halves = self.rotary.joint == "front", text.shape[1], self.rotary.halves
        if self.rotary.apart and turn is not None:
            of_image, of_text = (Angles.of(one, halves) for one in turn)
        elif self.rotary.image:
            of_image, of_text = Angles.of(turn, halves), Angles()
        else:
            both, split = Angles.of(turn, halves), words if front else x.shape[1]
            of_text, of_image = both.at(slice(split)), both.at(slice(split, None))
            of_image, of_text = (of_image, of_text) if front else (of_text, of_image)
        own, added = self.own(x, x, of_image), self.added(text, of_text)
        pairs = zip(added, own) if front else zip(own, added)
        query, key, value = (torch.cat(pair, 1) for pair in pairs)
        mixed = self.multiplied(query, key, value, mask=mask)
        image, text = (mixed[:, words:], mixed[:, :words]) if front else mixed.split([x.shape[1], words], 1)
        return self.ended(image), self.module.to_add_out(text) if "to_add_out" in self.ends else text

    def ended(self, mixed: Tensor) -> Tensor:
        for layer in self.module.to_out if "to_out.0" in self.ends else ():
            mixed = layer(mixed)
        return mixed

    def state(self) -> list[Any]:
        return [*super().state(), self.module.processor]
