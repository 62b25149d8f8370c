"""Ctrl-C, SIGTERM and SIGHUP: each ends the run in order, with its progress kept.

Python drops an exception that is raised in a destructor or a callback, wherever the signal happens
to arrive, and a library may turn it into another: so that a run was told to stop is remembered, and
the next report of progress raises it again.
"""

import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType

from se_compress.errors import SIGNAL_EXIT_CODE

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
# Shells and job systems send several; what the first one has begun to clean up is let finish.
ONE_REQUEST_SECONDS = 5.0

stopped = threading.Event()


@dataclass
class _Last:
    """The last signal that was acted on, and when."""

    number: int = signal.SIGINT
    at: float = -ONE_REQUEST_SECONDS


_last = _Last()


def listen() -> None:
    """Let the signals end the run. A SIGHUP that is ignored (nohup) stays so."""
    for number in WORDS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _hide_interrupt


def ignore() -> None:
    """From here on the run ends by itself."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)


def reason() -> tuple[str, int]:
    """What ended the run, for the user, and the exit code."""
    word = WORDS[signal.Signals(_last.number)]
    return f"{word}; the same command continues where it stopped", SIGNAL_EXIT_CODE + _last.number


def _stop(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if now - _last.at < ONE_REQUEST_SECONDS:
        return
    _last.number, _last.at = number, now
    stopped.set()
    raise KeyboardInterrupt


def _hide_interrupt(lost: "sys.UnraisableHookArgs") -> None:
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
