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
        self.code = code_of(stop)


def code_of(stop: KeyboardInterrupt) -> int:
    return stop.code if isinstance(stop, Ended) else CTRL_C


class Handler:
    """Raises what a signal asks for, and remembers it: a library on the way may make an error of its own of it,
    as reading weights (safetensors, torch) does of whatever is raised meanwhile."""

    def __init__(self) -> None:
        self.stop: KeyboardInterrupt | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        if isinstance(self.stop, Ended):  # once is enough: cleaning up is not to be interrupted
            return
        self.stop = KeyboardInterrupt() if number == signal.SIGINT else Ended(number)
        raise self.stop


@contextmanager
def keeping(words: str) -> Iterator[None]:
    """Say `words` if the user interrupts."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(words, stop) from None
    except Interrupted:
        raise
    except Exception:
        if (swallowed := asked()) is None:
            raise
        raise Interrupted(words, swallowed) from None


def asked() -> KeyboardInterrupt | None:
    """What a signal asked for since the command line listens."""
    handlers = (signal.getsignal(number) for number in (signal.SIGINT, *ASKING))
    return next((h.stop for h in handlers if isinstance(h, Handler) and h.stop is not None), None)


@contextmanager
def heeding() -> Iterator[None]:
    """Let signals that ask to end raise, as Ctrl-C does; what the caller ignores, as `nohup` does, stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # which has no say about signals
        yield
        return
    ours = Handler()
    former = {number: signal.getsignal(number) for number in ASKING}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        former[signal.SIGINT] = signal.default_int_handler
        signal.signal(signal.SIGINT, ours)
    for number in (number for number in ASKING if former[number] is signal.SIG_DFL):
        signal.signal(number, ours)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
