"""Attention whose processor runs as it is, while projections that are called with the same tensor share one product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.models.blocks.joined import JoinedAttention, LinearAttention
from stepquant.runtime import ops
from stepquant.runtime.blocks.attention import Readers
from stepquant.runtime.blocks.chain import Chain, codes_for, run
from stepquant.runtime.layers.layer import IntegerLayer
from stepquant.runtime.ops.code import Code


class Joined(Chain):
    """Inside its call the projections and the last layers know of each other; outside, each runs by itself."""

    def __init__(self, module: Any, declared: JoinedAttention, *swallowed: Any) -> None:
        layers = [[module.get_submodule(name) for name in group] for group in declared.groups]
        super().__init__(module, *(layer for group in layers for layer in group), *swallowed)
        self.shared = [Shared(*group) for group in layers]
        self.ends = {name: End(module.get_submodule(name)) for name in declared.ends}
        self.joints = [one.readers for one in self.shared]

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.unfused(*args, **kwargs)
        for one in self.shared:
            one.open = True
        try:
            return self.inside(*args, **kwargs)
        finally:
            for one in self.shared:
                one.close()
            for end in self.ends.values():
                end.streams = ()

    def inside(self, *args: Any, **kwargs: Any) -> Any:
        return self.unfused(*args, **kwargs)

    def ready(self) -> bool:
        """Whether its last layers take a gate."""
        return all(isinstance(end.layer, IntegerLayer) for end in self.ends.values())

    def set_beside(self, layer: Any) -> None:
        """Let another layer of the block, which no processor calls, share the first product."""
        first = self.shared[0]
        first.readers, first.has_beside = Readers(*first.readers.layers, layer), True
        self.joints = [one.readers for one in self.shared]

    def code(self, group: int = 0) -> Code | None:
        """What a norm in front of these projections may write; None if they read floats."""
        return self.shared[group].readers.code() if group < len(self.shared) else None

    def state(self) -> list[Any]:
        return [one.joins for one in self.joints]

    def placed(self) -> list[tuple[Any, Any]]:
        """Layers, and what takes the place of their forwards."""
        found: list[tuple[Any, Any]] = [
            (layer, Part(one, i)) for one in self.shared for i, layer in enumerate(one.readers.layers)
        ]
        ends = [(end.layer, end) for end in self.ends.values()]
        return [(layer, part) for layer, part in found + ends if isinstance(layer, IntegerLayer)]


class Linear(Joined):
    """Attention whose products are sums over all tokens, in float32, as its processor does it; of what may be codes."""

    def __init__(self, module: Any, declared: LinearAttention) -> None:
        super().__init__(module, declared)
        self.heads, self.processor = declared.heads, module.processor

    def inside(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x, module = hidden_states, self.module
        asked = any(one is not None for one in (*args, *kwargs.values()))
        if asked or x.dim() != 3 or x.dtype == torch.float16 or module.processor is not self.processor:
            return super().inside(x, *args, **kwargs)
        query, key, value = module.to_q(x), module.to_k(x), module.to_v(x)
        query = query if module.norm_q is None else module.norm_q(query)
        key = key if module.norm_k is None else module.norm_k(key)
        dtype = value.dtype
        query, key, value = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (query, key, value)
        )
        query, key, value = query.relu().float(), key.relu().float(), F.pad(value.float(), (0, 1), value=1.0)
        sums = query @ (key.mT @ value)
        mixed = (sums[..., :-1] / (sums[..., -1:] + 1e-15)).transpose(1, 2).flatten(2).to(dtype)
        for layer in module.to_out:
            mixed = layer(mixed)
        return mixed

    def state(self) -> list[Any]:
        return [*super().state(), self.module.processor]


class Shared:
    """What several layers make of one tensor, computed when the first of them is asked."""

    def __init__(self, *layers: Any) -> None:
        self.readers = Readers(*layers)
        self.open = False
        self.source: Tensor | None = None  # what the outputs that wait were made of
        self.waiting: dict[int, Tensor] = {}
        self.has_beside = False  # a layer that no processor calls
        self.aside: Tensor | None = None  # and its output
        self.dtype = torch.float32  # of the outputs, where the source is codes already

    def __call__(self, index: int, x: Tensor) -> Tensor | None:
        """The output of one layer for `x`; None if it has to run by itself."""
        code = self.readers.code()
        if not self.open or code is None or not self.readers.joins:
            return None
        if self.source is not x or index not in self.waiting:
            if index > 0 and self.source is not x:
                return None  # the first was asked about another tensor
            self.source, self.waiting = x, self.made(x, code)
        return self.waiting.pop(index)

    def close(self) -> None:
        """Let go of all but what the layer beside made."""
        index = len(self.readers.layers) - 1
        self.aside = self.waiting.get(index) if self.has_beside else None
        self.open, self.source, self.waiting = False, None, {}

    def beside(self, codes: Tensor) -> Tensor:
        """What the layer beside makes of the codes that the others have just read."""
        out, self.aside = self.aside, None
        return self.readers.layers[-1].from_codes(codes, self.dtype) if out is None else out  # type: ignore[no-any-return]

    def made(self, x: Tensor, code: Code) -> dict[int, Tensor]:
        known = x.dtype == torch.uint8
        codes = x if known else ops.quantize(x, code)
        rows = self.readers(codes.reshape(-1, x.shape[-1]), self.dtype_of(x))
        return {i: out.unflatten(0, x.shape[:-1]) for i, out in enumerate(rows)}

    def dtype_of(self, x: Tensor) -> torch.dtype:
        return self.readers.layers[0].emit or (self.dtype if x.dtype == torch.uint8 else x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"source": None, "waiting": {}, "aside": None}


class Part:
    """Stands in for the forward of one projection."""

    goes_along = True

    def __init__(self, shared: Shared, index: int) -> None:
        self.shared, self.index = shared, index

    def __call__(self, input: Tensor) -> Tensor:
        out = self.shared(self.index, input)
        if out is not None:
            return out
        layer = self.shared.readers.layers[self.index]
        if input.dtype == torch.uint8:
            return layer.from_codes(input, self.shared.dtype_of(input))  # type: ignore[no-any-return]
        return type(layer).forward(layer, input)  # type: ignore[no-any-return]


class End:
    """Stands in for the forward of the last layer, which gates what it returns and adds it to the stream."""

    goes_along = True

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.streams: tuple[
            tuple[Tensor, Tensor | None], ...
        ] = ()  # in the order of their tokens, with their gates

    def __call__(self, input: Tensor) -> Tensor:
        if not self.streams:
            return type(self.layer).forward(self.layer, input)  # type: ignore[no-any-return]
        outs = self.apart(input)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def apart(self, input: Tensor) -> list[Tensor]:
        """What it makes of the tokens of each stream."""
        streams, self.streams = self.streams, ()
        codes = codes_for(self.layer, input)
        parts = codes.split([stream.shape[1] for stream, _ in streams], 1) if streams[1:] else (codes,)
        return [
            run(self.layer, part, stream.dtype, stream, gate) for part, (stream, gate) in zip(parts, streams)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"streams": ()}
