"""Fused blocks with adaptive norms: a norm, its scale and shift write codes; gate and stream join in the last product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepquant.models.blocks.modulated import ModulatedBlock
from stepquant.models.blocks.root_norm import gain, is_plain_root_norm
from stepquant.runtime import ops
from stepquant.runtime.blocks.chain import Chain
from stepquant.runtime.blocks.feed import FeedForward
from stepquant.runtime.blocks.joined import Joined
from stepquant.runtime.ops.code import Code

Modulation = tuple[Tensor, ...]


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
        """Whether something of it does what only its own class knows."""
        now = [one.module.processor for one in self.attentions]
        return any(a is not b for a, b in zip(now, self.processors)) or any(
            getattr(self.module, name, None) is not None for name in self.declared.unless
        )

    def leaves_out(self, x: Tensor) -> bool:
        """Whether the block is asked for what only its own class does."""
        return x.dim() != 3 or x.dtype == torch.float16 or self.changed()

    def state(self) -> list[Any]:
        found = [getattr(self.module, name, None) for name in self.declared.unless]
        return found + [one.module.processor for one in self.attentions]

    def fed(self, feed: FeedForward, x: Tensor, branch: Branch, onto: Tensor | None = None) -> Tensor:
        """The stream behind one feed-forward; `onto`: what it joins instead of what it reads."""
        shift, scale, gate = branch.modulation
        rows = normed(x, branch.norm, feed.code(), scale, shift)
        return feed.of(rows, x.dtype, x if onto is None else onto, gate)

    def attended(self, joined: Joined, rows: Tensor, x: Tensor, gate: Tensor | None, **kwargs: Any) -> Tensor:
        """The stream behind one attention over `rows`, floats or codes."""
        joined.shared[0].dtype = x.dtype
        joined.ends["to_out.0"].streams = ((x, gate),)
        return joined.module(rows, **kwargs)  # type: ignore[no-any-return]

    def through(self, x: Tensor, *branches: Branch) -> Tensor:
        """The stream behind all attentions, one after the other, and the feed-forward."""
        return self.fed(self.feeds[0], self.behind(x, *branches[:-1]), branches[-1])

    def behind(self, x: Tensor, *branches: Branch) -> Tensor:
        """The stream behind all attentions, one after the other."""
        for attention, branch in zip(self.attentions, branches):
            shift, scale, gate = branch.modulation
            rows = x if branch.norm is None else normed(x, branch.norm, attention.code(), scale, shift)
            x = self.attended(attention, rows, x, gate, **branch.given)
        return x


def made(norm: Any, temb: Tensor, count: int) -> Modulation:
    """What the layer of an adaptive norm makes of t."""
    return norm.linear(norm.silu(temb)).chunk(count, dim=1)  # type: ignore[no-any-return]


def normed(
    x: Tensor, norm: Any, code: Code | None, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """The layer norm or RMS norm of each sample, scaled and shifted; codes where those who read it agree on them."""
    if code is None:
        y = norm(x)
        y = y if scale is None else y * (1 + scale[:, None])
        return (y if shift is None else y + shift[:, None]).to(x.dtype)  # type: ignore[no-any-return]
    if is_plain_root_norm(norm):
        return ops.rms_norm_quantize(x, gain(norm), norm.eps, code, scale, shift)
    return ops.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, code, scale, shift)
