"""Talks to a reward server within a time limit: every answer is checked, what may pass is tried again.

Tried again, with exponentially growing, jittered pauses, for `max_wait` after the first failure: no connection, no
answer in time, an answer that is no reply of a reward server (a gateway's error page), a full queue (503), the server's
time limit (504). Final at once: a wrong token, what the server refuses for its content, a reward that raised, a reply
of the right form whose content is wrong (count, type, not finite), another reward than before. Redirections are not
followed and proxies not used.

Plain `http.client`: one connection a request, nothing to install.
"""

from __future__ import annotations

import http.client
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final
from urllib.parse import urlsplit

from rewards.base import RewardError
from rewards.wire import JSON, WireError, parse_reply

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE, _SHORTEST_TRY = 0.5, 30.0, 1.0
_MAX_REPLY_BYTES = 64 << 20
_TRANSIENT = {408, 425, 429, 502, 503, 504}
_CURES = {
    401: "set the variable that token_env names to the server's token",
    404: "see the server's /health for the names it serves",
    413: "set batch_size, or start the server with a larger --max-body-mb",
}


class Transient(Exception):
    """A failure that may pass."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait.

    Attributes:
        timeout: seconds for one try.
        max_wait: seconds, from the first failure of a request, for all further tries.
    """

    timeout: float
    max_wait: float


@final
class Client:
    """One server, as seen from here.

    Args:
        url: `http://HOST:PORT`, or https, with an optional path before the server's own.
        token: to present; empty for none.
        patience: time limits.
        label: what messages call the reward.

    Raises:
        ValueError: the address is not one.
    """

    def __init__(self, url: str, *, token: str, patience: Patience, label: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{label}: url must be http://HOST:PORT or https://HOST:PORT, got {url!r}")
        if parts.username or parts.password:
            raise ValueError(f"{label}: leave user and password out of the url; set token_env")
        try:
            self._port = parts.port
        except ValueError as error:
            raise ValueError(f"{label}: url {url!r}: {error}") from error
        self._connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host = parts.hostname
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._patience = patience
        self._label = label
        self.url = url.rstrip("/")

    def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        content_type: str = JSON,
        accept: Callable[[dict[str, object]], None] | None = None,
    ) -> dict[str, object]:
        """One request, tried until it is answered or the time is over.

        Args:
            method: GET or POST.
            path: from the server's root.
            body: to send.
            content_type: of the body.
            accept: raises `Transient` when a reply of status 200 should be asked for again.

        Returns:
            The reply's JSON.

        Raises:
            RewardError: refused for good, or no good answer within `max_wait`.
        """
        deadline: float | None = None
        pause, tries, seconds = _FIRST_PAUSE, 0, self._patience.timeout
        while True:
            tries += 1
            try:
                reply = self._try(method, path, body, content_type, seconds)
                if accept is not None:
                    accept(reply)
                return reply
            except Transient as error:
                now = time.monotonic()
                deadline = now + self._patience.max_wait if deadline is None else deadline
                if now >= deadline:
                    waited = f"{self._patience.max_wait:g} s and {tries} tries"
                    raise RewardError(f"{self._label}: {self.url}: {error}; gave up after {waited}") from error
                left = deadline - now
                _LOG.warning("%s: %s: %s; trying again for up to %.2g s", self._label, self.url, error, left)
                time.sleep(min(pause * random.SystemRandom().uniform(0.5, 1.0), left))
                pause = min(2 * pause, _LONGEST_PAUSE)
                seconds = min(self._patience.timeout, max(deadline - time.monotonic(), _SHORTEST_TRY))

    def _try(self, method: str, path: str, body: bytes, content_type: str, seconds: float) -> dict[str, object]:
        deadline = time.monotonic() + seconds
        connection = self._connection(self._host, self._port, timeout=seconds)
        try:
            headers = {**self._headers, "Content-Type": content_type} if body else self._headers
            try:
                connection.request(method, self._prefix + path, body=body or None, headers=headers)
            except (BrokenPipeError, ConnectionResetError):
                _LOG.debug("the server answered before it had read the body")
            response = connection.getresponse()
            data = _read(connection, response, deadline)
            return self._judge(response.status, data)
        except TimeoutError as error:
            raise Transient(f"no answer within {seconds:.3g} s") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Transient(f"no answer ({type(error).__name__}: {reason})") from error
        finally:
            connection.close()

    def _judge(self, status: int, data: bytes) -> dict[str, object]:
        try:
            reply = parse_reply(data)
        except WireError as error:
            if status in (401, 403):
                raise RewardError(f"{self._label}: {self.url} refuses with status {status}; {_CURES[401]}") from error
            raise Transient(f"answered with status {status}, and {error}") from error
        if status == 200:
            return reply
        about = reply.get("error")
        message = about.get("message") if isinstance(about, dict) else None
        if not isinstance(message, str):
            raise Transient(f"answered with status {status} and no error message of a reward server")
        if status in _TRANSIENT:
            raise Transient(f"status {status}: {message}")
        cure = f"; {_CURES[status]}" if status in _CURES else ""
        raise RewardError(f"{self._label}: {self.url}: status {status}: {message}{cure}")


def _read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, within the limits of size and time even when it comes in drops."""
    data = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:  # http.client lets go of it once the reply says that it closes
            connection.sock.settimeout(left)
        chunk = response.read1(1 << 16)
        if not chunk:
            break
        data += chunk
        if len(data) > _MAX_REPLY_BYTES:
            raise Transient(f"answered with more than {_MAX_REPLY_BYTES >> 20} MiB")
    if response.length:
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)
