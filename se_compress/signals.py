"""Ctrl-C, SIGTERM and SIGHUP: each ends the run in order, with its progress kept.

Python drops an exception that is raised in a destructor or a callback, wherever the signal happens
to arrive, and a library may turn it into another: so that a run was told to stop is remembered, and
the next report of progress raises it again.

A second request ends the process at once, whatever it is doing: a thread hears it, for Python runs
no handler while the main thread waits in a library. Progress needs no care for that; it withstands
SIGKILL.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from se_compress.errors import SIGNAL_EXIT_CODE

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
# Shells and job systems send several, torchrun passes on what its workers got already: what follows
# the first within this time asks for nothing new.
ONE_REQUEST_SECONDS = 1.0

stopped = threading.Event()


@dataclass
class _First:
    """The signal that ends the run in order."""

    number: int = signal.SIGINT


_first = _First()


def listen(tell: Callable[[str, int], None]) -> None:
    """Let the signals end the run. A SIGHUP that is ignored (nohup) stays so.

    tell  says why the process ends, and with which exit code, where a second request ends it
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    threading.Thread(target=_hear, args=(heard, tell), daemon=True).start()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    # what a child that is no program of its own gets is not meant for this process
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
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
    return _reason(_first.number)


def _reason(number: int) -> tuple[str, int]:
    word = WORDS[signal.Signals(number)]
    return f"{word}; the same command continues where it stopped", SIGNAL_EXIT_CODE + number


def _hear(heard: int, tell: Callable[[str, int], None]) -> None:
    """End the process at the second request. Every signal that has a handler is a byte here."""
    first: float | None = None
    while True:
        for number in os.read(heard, 64):
            now = time.monotonic()
            if number not in WORDS:
                continue
            first = now if first is None else first
            if now - first >= ONE_REQUEST_SECONDS:
                message, code = _reason(number)
                tell(message, code)
                os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    if stopped.is_set():  # a second request is the thread's: two would say why
        return
    _first.number = number
    stopped.set()
    raise KeyboardInterrupt


def _hide_interrupt(lost: "sys.UnraisableHookArgs") -> None:
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
