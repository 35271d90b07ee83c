"""Ctrl-C and the signals that ask to end, with words about what was kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CTRL_C = 130
ASKING = (
    signal.SIGTERM,
    signal.SIGHUP,
)  # of `kill`, `docker stop`, batch systems, and a terminal that closes


class Ended(KeyboardInterrupt):
    """A signal that asks to end: what cleans up after Ctrl-C cleans up after it."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number


class Interrupted(Exception):  # noqa: N818 - the user's wish, no error
    """The user pressed Ctrl-C; the message says what was kept and how to go on."""

    def __init__(self, words: str, stop: KeyboardInterrupt) -> None:
        super().__init__(words)
        self.code = stop.code if isinstance(stop, Ended) else CTRL_C


@contextmanager
def keeping(words: str) -> Iterator[None]:
    """Say `words` if the user interrupts."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(words, stop) from None


@contextmanager
def heeding() -> Iterator[None]:
    """Let signals that ask to end raise, as Ctrl-C does; what the caller ignores, as `nohup` does, stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # which has no say about signals
        yield
        return
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    former = {number: signal.getsignal(number) for number in ASKING}
    for number in (number for number, handler in former.items() if handler is signal.SIG_DFL):
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def end(number: int, _: FrameType | None) -> None:
    for other in ASKING:  # once is enough: cleaning up is not to be interrupted
        signal.signal(other, signal.SIG_IGN)
    raise Ended(number)
