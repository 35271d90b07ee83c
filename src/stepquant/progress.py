"""One way to say how far a long job is: the library calls `track`, the command line draws it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Yields the items one by one; `note` is called with a few words about the latest item, or about none."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]: ...

    def note(self, words: str) -> None: ...


class Silent:
    """Progress that shows nothing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def note(self, words: str) -> None:
        return None
