"""The least and the greatest number that every layer and every attention product reads, noted while the float model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stepquant.models.denoiser import Denoiser
from stepquant.models.families.roles import LEAVES
from stepquant.models.hooks import read_by, removing

OPERANDS = ("query", "key", "value")


class Ends(TorchFunctionMode):
    """Notes them for the wanted rows of a call. What the model computes stays as it is: a product is seen on its way to torch."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        modules = denoiser.model.named_modules()
        self.layers = {f"{path}:input": module for path, module in modules if isinstance(module, LEAVES)}
        self.products = {path: denoiser.model.get_submodule(path) for path in denoiser.products()}
        operands = [f"{path}:{port}" for path in self.products for port in OPERANDS]
        self.places = {place: number for number, place in enumerate((*self.layers, *operands))}
        self.within: list[str] = []  # the attentions that are being called, the innermost last
        self.entries, self.rows, self.found = 1, torch.empty(0, dtype=torch.long), torch.empty(0)

    def of_next_call(self, entries: int, rows: Sequence[int] | Tensor) -> Tensor:
        """(rows, places, 2), filled while the call of so many samples runs; of what it does not read, the least is above the greatest."""
        self.entries, self.rows = entries, torch.as_tensor(rows, dtype=torch.long)
        self.found = torch.tensor([torch.inf, -torch.inf]).repeat(len(self.rows), len(self.places), 1)
        return self.found

    def note(self, place: str, x: Tensor) -> None:
        """Rows that are folded into those of a call lie together, as frames and windows do; a single one is read by all. Of
        others nobody knows whose they are: NaN."""
        if not len(self.rows) or not x.numel():
            return
        if len(x) != 1 and len(x) % self.entries:
            self.found[:, self.places[place]] = torch.nan
            return
        values = x.detach().reshape(1 if len(x) == 1 else self.entries, -1)
        both = values.amin(1), values.amax(1)
        low, high = (end.float().cpu().expand(self.entries)[self.rows] for end in both)
        known = self.found[:, self.places[place]]
        known[:, 0], known[:, 1] = torch.minimum(known[:, 0], low), torch.maximum(known[:, 1], high)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.within:
            for port, operand in (dict(zip(OPERANDS, args)) | kwargs).items():
                if port in OPERANDS:
                    self.note(f"{self.within[-1]}:{port}", operand)
        return func(*args, **kwargs)


@contextmanager
def noting(denoiser: Denoiser) -> Iterator[Ends]:
    """Watch the layers and the products of a model."""
    ends = Ends(denoiser)

    def reads(place: str) -> Callable[..., None]:
        return lambda _, args, kwargs: ends.note(place, read_by(args, kwargs))

    with ExitStack() as stack:
        for place, layer in ends.layers.items():
            stack.enter_context(removing(layer.register_forward_pre_hook(reads(place), with_kwargs=True)))
        for path, product in ends.products.items():
            entering = product.register_forward_pre_hook(lambda *_, path=path: ends.within.append(path))
            leaving = product.register_forward_hook(lambda *_: ends.within.pop() and None, always_call=True)
            stack.enter_context(removing(entering))
            stack.enter_context(removing(leaving))
        yield stack.enter_context(ends)
