"""Closes connections that ask for nothing: whoever reaches the port could hold all that a server has room for.

A connection waits from when it is opened, or from its last answer, until the header of a request is whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, final

_GRACE_SECONDS = 1.0
"""A connection that was opened just now is about to ask."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Client = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    transport: asyncio.Transport
    since: float
    timer: asyncio.TimerHandle


@final
class Connections:
    """The connections of a server that wait; used from its event loop only.

    Args:
        patience: Seconds that one may wait.
        most: How many may wait; beyond, the one that has waited longest is closed.
    """

    def __init__(self, *, patience: float, most: int) -> None:
        self._patience = patience
        self._most = most
        self._open: dict[Client, asyncio.Transport] = {}
        self._waiting: dict[Client, _Waiting] = {}  # the one that has waited longest first

    def protocol(self, base: Callable[..., asyncio.Protocol]) -> type[asyncio.Protocol]:
        """A protocol of the server's library that tells which connections there are.

        Args:
            base: The library's own.
        """
        assert isinstance(base, type)
        connections = self

        class Watched(base):  # type: ignore[misc, valid-type]
            def connection_made(self, transport: asyncio.Transport) -> None:
                super().connection_made(transport)
                self._client = _client(transport.get_extra_info("peername"))
                connections._open[self._client] = transport
                connections._wait(self._client)

            def connection_lost(self, error: Exception | None) -> None:
                connections._open.pop(self._client, None)
                connections._stop_waiting(self._client)
                super().connection_lost(error)

        return Watched

    def application(self, inner: Application) -> Application:
        """An application that tells which connections are being answered.

        Args:
            inner: The one that answers.
        """

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            client = _client(scope.get("client"))
            self._stop_waiting(client)
            try:
                await inner(scope, receive, send)
            finally:
                if client in self._open:
                    self._wait(client)

        return answer

    def _wait(self, client: Client) -> None:
        self._stop_waiting(client)
        timer = asyncio.get_running_loop().call_later(self._patience, self._open[client].abort)
        now = time.monotonic()
        self._waiting[client] = _Waiting(transport=self._open[client], since=now, timer=timer)
        for other, waiting in list(self._waiting.items()):
            if len(self._waiting) <= self._most or now - waiting.since < _GRACE_SECONDS:
                break
            self._stop_waiting(other)
            waiting.transport.abort()

    def _stop_waiting(self, client: Client) -> None:
        waiting = self._waiting.pop(client, None)
        if waiting is not None:
            waiting.timer.cancel()


def _client(address: object) -> Client:
    """Host and port; a connection without a name of its own is none of ours to close."""
    host, port = address[:2] if isinstance(address, tuple | list) and len(address) >= 2 else ("", 0)
    return str(host), int(port)
