"""HTTP with limits that hold: one time for a whole exchange, and texts from a server that are safe to show.

The limit of `http.client` counts for each wait. A server that sends a header, a `100 Continue` or a byte of the body
now and then would hold a request for ever, so a timer ends the connection from outside.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self, final

SHOWN_LETTERS = 300


@final
class TimeLimit:
    """How long an exchange may take, from connecting to the last byte; a context that ends with it.

    Attributes:
        passed: Whether the connection was ended because the time was over.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._end = time.monotonic() + seconds
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def left(self) -> float:
        """Seconds, at least a thousandth: 0 would mean no limit to a socket."""
        return max(1e-3, self._end - time.monotonic())

    def watch(self, connected: socket.socket) -> None:
        """Ends a connection when the time is over."""
        self._timer = threading.Timer(self.left, self._end_connection, [connected])
        self._timer.daemon = True
        self._timer.start()

    def _end_connection(self, connected: socket.socket) -> None:
        self.passed = True
        with suppress(OSError):  # closed in the meantime
            connected.shutdown(socket.SHUT_RDWR)


@final
class Connection(http.client.HTTPConnection):
    """A connection under a time limit.

    Args:
        host: As for `http.client`.
        port: As for `http.client`.
        limit: Of the exchange.
        timeout: Seconds for each wait, where that is less.
    """

    def __init__(self, host: str, port: int | None = None, *, limit: TimeLimit, timeout: float = float("inf")) -> None:
        super().__init__(host, port, timeout=min(timeout, limit.left))
        self._limit = limit

    def connect(self) -> None:
        """Connects, and has the rest watched."""
        super().connect()
        self._limit.watch(self.sock)


@final
class SecureConnection(http.client.HTTPSConnection):
    """The same over TLS; the handshake is limited as one wait.

    Args:
        host: As for `http.client`.
        port: As for `http.client`.
        limit: Of the exchange.
        timeout: Seconds for each wait, where that is less.
    """

    def __init__(self, host: str, port: int | None = None, *, limit: TimeLimit, timeout: float = float("inf")) -> None:
        super().__init__(host, port, timeout=min(timeout, limit.left))
        self._limit = limit

    def connect(self) -> None:
        """Connects, and has the rest watched."""
        super().connect()
        self._limit.watch(self.sock)


def shown(text: object, *, letters: int = SHOWN_LETTERS) -> str:
    """A text from elsewhere on one line: what a terminal would obey is escaped, what is too long is cut."""
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text)[: letters + 1])
    return plain if len(plain) <= letters else f"{plain[:letters]}..."
