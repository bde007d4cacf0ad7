"""Signals that ask a run to stop: noticed at once, acted upon at the next safe point, by all processes together.

A batch system announces its end by SIGTERM or SIGUSR1, a user by Ctrl-C (SIGINT), a terminal that closes by SIGHUP; the
signal may reach one process of many. A handler only remembers it. Between batches every process asks whether any has
been told to stop (`Processes.safe_point`), so that all leave at the same place and none waits for one that is gone.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name))
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, or a resume, will do
SAME_SIGNAL_SECONDS = 1.0


class Interrupted(Exception):
    """A safe point was reached after a signal; raised on every process.

    Attributes:
        signal: Name of the signal, such as `SIGTERM`.
        phase: What was going on.
    """

    def __init__(self, number: int, phase: str) -> None:
        self.signal = signal.Signals(number).name
        self.phase = phase
        super().__init__(f"{self.signal} during {phase}")


class RunStopped(RuntimeError):
    """A run ended early and cleanly on a signal; the message says what is lost and how to go on."""


class PeerLost(RunStopped):
    """Another process of the run is gone; every process that is left says so, since the main one may be it."""


def ignore_late_warnings() -> None:
    """Ignores SIGUSR1 from here on, in a process that is done: a batch system's warning must not change its status."""
    if hasattr(signal, "SIGUSR1"):  # else Windows, whose batch systems have other ways
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Signals:
    """Remembers the first of SIGTERM, SIGUSR1, SIGINT and SIGHUP that reaches this process.

    A second one acts as without this class: it ends the process at once. A repeat within a second counts as the same
    signal, since launchers and batch systems often deliver one by two ways.

    Attributes:
        received: Number of the signal; 0 for none so far.
    """

    def __init__(self) -> None:
        self.received = 0
        self._time = 0.0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handles signals for the time of a `with` block; outside of the main thread, where Python allows none, not."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in HANDLED if not _is_ignored_hangup(number)]
        before = {number: signal.signal(number, self._handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._time = number, now
            name = signal.Signals(number).name
            text = f"{name}: stopping at the next safe point; a second signal ends the run at once\n"
            with suppress(OSError):  # the terminal may be what is gone
                os.write(2, text.encode())  # print() must not be entered twice
        elif now - self._time > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    """Whether this is SIGHUP and somebody, such as nohup, has seen to it that it ends nothing."""
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
