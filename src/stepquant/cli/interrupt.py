"""Ctrl-C, with words about what was kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):  # noqa: N818 - the user's wish, no error
    """The user pressed Ctrl-C; the message says what was kept and how to go on."""


@contextmanager
def keeping(words: str) -> Iterator[None]:
    """Say `words` if the user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(words) from None
