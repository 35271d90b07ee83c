"""Tensors that are never there at once: made slice by slice, and read as often as somebody passes over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

# Elements. Smaller, each slice would multiply too few rows; larger, the allocator leaves holes of their size, or hands
# them back to the system, which clears every page again.
AT_ONCE = 1 << 20
SIGN, LOW_BITS = 31, 16  # of a float's 32 bits


@dataclass(frozen=True, eq=False)
class Slices:
    """The elements of one tensor; every pass over them makes the slices anew."""

    make: Callable[[], Iterable[Tensor]]
    count: int

    @classmethod
    def of(cls, x: Tensor) -> Slices:
        """A tensor that is there already."""
        return cls(lambda: (x.detach(),), x.numel())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.make())

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest element, one of each; NaN if there is any."""
        # One after the other: what is kept from every slice would pin the memory of the next one's neighbours.
        low = high = None
        for part in self:
            least, most = part.aminmax()
            low = least if low is None else torch.minimum(low, least)
            high = most if high is None else torch.maximum(high, most)
        assert low is not None
        assert high is not None
        return low.float().reshape(1), high.float().reshape(1)

    def histogram(self, bins: int) -> Tensor:
        """How many elements lie in each of so many equal parts of the range, in float64."""
        low, high = (end.item() for end in self.ends)
        return sum(part.float().histc(bins, low, high).double() for part in self)  # type: ignore[return-value]

    def ranked(self, ranks: Sequence[int]) -> Tensor:
        """The elements of these ranks in ascending order, of the least from 0 on, as sorting would find them."""
        wanted = torch.tensor(ranks)
        upper = 1 << LOW_BITS
        above = sum(torch.bincount((order(part) >> LOW_BITS) + upper // 2, minlength=upper) for part in self)
        assert isinstance(above, Tensor)
        until = above.cumsum(0).cpu()
        places = torch.searchsorted(until, wanted, right=True)
        known = places.unique()
        below = torch.zeros(len(known), upper, dtype=torch.int64)
        for part in self:
            bits = order(part)
            for counts, place in zip(below, known.tolist()):
                chosen = bits[(bits >> LOW_BITS) + upper // 2 == place] & (upper - 1)
                counts += torch.bincount(chosen, minlength=upper).cpu()
        first = (until - above.cpu())[places]
        rows = below[torch.searchsorted(known, places)].cumsum(1)
        low = torch.searchsorted(rows, (wanted - first)[:, None], right=True)[:, 0]
        return value_of(((places - upper // 2) << LOW_BITS) + low)


def order(x: Tensor) -> Tensor:
    """Integers of 32 bits in the order of the numbers."""
    bits = x.reshape(-1).float().view(torch.int32)
    return bits ^ ((bits >> SIGN) & 0x7FFFFFFF)


def value_of(place: Tensor) -> Tensor:
    """The number whose `order` is `place`."""
    bits = place.to(torch.int32)
    return (bits ^ ((bits >> SIGN) & 0x7FFFFFFF)).view(torch.float32)


Cut = tuple[slice, slice, slice]  # of samples, heads and queries


def cuts(samples: int, heads: int, queries: int, keys: int, at_once: int | None = None) -> list[Cut]:
    """Slices of (samples, heads, queries, keys), all keys in each, of about `at_once` elements at most."""
    at_once = AT_ONCE if at_once is None else at_once
    rows = max(at_once // keys, 1)
    if rows < queries:
        sizes = 1, 1, rows
    elif rows < heads * queries:
        sizes = 1, rows // queries, queries
    else:
        sizes = rows // (heads * queries), heads, queries
    starts = (range(0, total, size) for total, size in zip((samples, heads, queries), sizes))
    return [
        (slice(a, a + sizes[0]), slice(b, b + sizes[1]), slice(c, c + sizes[2]))
        for a, b, c in product(*starts)
    ]
