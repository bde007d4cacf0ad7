"""Talks to a reward server within a time limit: every answer is checked, what may pass is tried again.

Tried again, with exponentially growing, jittered pauses, for `max_wait` after the first failure: no connection, no
answer in time, an answer that is no reply of a reward server (a gateway's error page), a full queue (503), the server's
time limit (504). Final at once: a wrong token, what the server refuses for its content, a reward that raised, a reply
of the right form whose content is wrong (count, type, not finite), another reward than before. Redirections are not
followed and proxies not used. The time of one try is that of the whole exchange, headers and `100 Continue` included.

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

from rewards.base import RewardError, UserError
from rewards.models.http_limits import Connection, SecureConnection, TimeLimit, shown
from rewards.serving.wire import JSON, WireError, parse_reply

_LOG = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE, _SHORTEST_TRY = 0.5, 30.0, 1.0
_MAX_REPLY_BYTES = 64 << 20
_MESSAGE_LETTERS = 2000  # a reward's own error, with its prompt, is worth reading whole
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
        timeout: Seconds for one try.
        max_wait: Seconds, from the first failure of a request, for all further tries.
    """

    timeout: float
    max_wait: float


@final
class Client:
    """One server, as seen from here.

    Args:
        url: `http://HOST:PORT`, or https, with an optional path before the server's own.
        token: To present; empty for none.
        patience: Time limits.
        label: What messages call the reward.

    Raises:
        UserError: The address is not one.
    """

    def __init__(self, url: str, *, token: str, patience: Patience, label: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"{label}: url must be http://HOST:PORT or https://HOST:PORT, got {url!r}")
        if parts.username or parts.password:
            raise UserError(f"{label}: leave user and password out of the url; set token_env")
        try:
            self._port = parts.port
        except ValueError as error:
            raise UserError(f"{label}: url {url!r}: {error}") from error
        self._connection = SecureConnection if parts.scheme == "https" else Connection
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
            path: From the server's root.
            body: To send.
            content_type: Of the body.
            accept: Raises `Transient` when a reply of status 200 should be asked for again.

        Returns:
            The reply's JSON.

        Raises:
            RewardError: Refused for good, or no good answer within `max_wait`.
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
        limit = TimeLimit(seconds)
        connection = self._connection(self._host, self._port, limit=limit)
        try:
            with limit:
                status, data = self._exchange(connection, method, path, body, content_type)
        except (OSError, http.client.HTTPException) as error:
            if limit.passed or isinstance(error, TimeoutError):
                raise Transient(f"no answer within {seconds:.3g} s") from error
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Transient(f"no answer ({type(error).__name__}: {shown(reason)})") from error
        finally:
            connection.close()
        if limit.passed:  # a body without a length ends quietly
            raise Transient(f"no answer within {seconds:.3g} s")
        return self._judge(status, data)

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes, content_type: str
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        headers = {**self._headers, "Content-Type": content_type} if body else self._headers
        try:
            connection.request(method, self._prefix + path, body=body or None, headers=headers)
        except (BrokenPipeError, ConnectionResetError):
            _LOG.debug("the server answered before it had read the body")
        response = connection.getresponse()
        data = response.read(_MAX_REPLY_BYTES + 1)
        if len(data) > _MAX_REPLY_BYTES:
            raise Transient(f"answered with more than {_MAX_REPLY_BYTES >> 20} MiB")
        if response.length:
            raise http.client.IncompleteRead(data, response.length)
        return response.status, data

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
        message = shown(message, letters=_MESSAGE_LETTERS)
        if status in _TRANSIENT:
            raise Transient(f"status {status}: {message}")
        cure = f"; {_CURES[status]}" if status in _CURES else ""
        raise RewardError(f"{self._label}: {self.url}: status {status}: {message}{cure}")
