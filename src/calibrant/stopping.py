"""Signals that ask a long run to stop where it can continue later."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_REQUESTED = threading.Event()


class StoppedError(Exception):
    """A run stopped because it was asked to; the message says how it continues."""


@contextmanager
def stopping_gently(tell: Callable[[str], None]) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM asks runs to stop at a safe place, and the second one stops at once.

    ``tell`` gets a sentence about that. Only for a program's main thread.
    """

    def requested(number: int, frame: FrameType | None) -> None:
        _REQUESTED.set()
        for one, handler in before.items():
            signal.signal(one, handler)
        tell("stopping where the run can continue later; the same signal again stops at once")

    before = {one: signal.signal(one, requested) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        _REQUESTED.clear()


def check_stop(saved: str) -> None:
    """Stop where a run can continue later, if a signal has asked for it; ``saved`` says after what.

    Raises:
        StoppedError: a signal has asked to stop.
    """
    if stop_requested():
        raise stopped(saved)


def stopped(saved: str) -> StoppedError:
    """The error of a run that stops after ``saved``."""
    return StoppedError(f"stopped after {saved}: the same command continues from there")


def stop_requested() -> bool:
    """Whether a signal has asked to stop."""
    return _REQUESTED.is_set()
