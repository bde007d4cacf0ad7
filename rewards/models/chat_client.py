"""A client of OpenAI-compatible servers (vLLM, SGLang, llama.cpp, OpenAI): JSON over HTTP, with deadlines and retries.

Only what a judge needs: POST /chat/completions and GET /models. What may pass (no connection, a timeout, status 408,
409, 425, 429 or 5xx, a body that is not JSON) is tried again after a pause that doubles; everything else fails at once.
The timeout counts for a whole exchange, so that a server that hangs or trickles cannot stop a run.
Redirects are refused: they would take the key and the pictures elsewhere.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import IO
from urllib.parse import urlsplit

from rewards.base import UserError
from rewards.models.http_limits import Connection, SecureConnection, TimeLimit, shown

MAX_REPLY_BYTES = 4 << 20
MAX_PAUSE_SECONDS = 60.0
_TRANSIENT = frozenset({408, 409, 425, 429})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class ChatError(RuntimeError):
    """The server could not be reached, refused the request, or replied with something else than asked."""


class _TransientError(Exception):
    """What may be different next time."""

    def __init__(self, message: str, *, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _Http(urllib.request.HTTPHandler):
    def __init__(self, limit: TimeLimit) -> None:
        super().__init__()
        self._limit = limit

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(Connection, limit=self._limit), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, limit: TimeLimit) -> None:
        super().__init__()
        self._limit = limit

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(SecureConnection, limit=self._limit), req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None  # urllib then raises the status as an HTTPError


@dataclass(frozen=True, kw_only=True)
class ChatClient:
    """Where to ask, and how patiently.

    Attributes:
        url: Base address with the version, such as `http://localhost:8000/v1`.
        api_key: Sent as bearer token; empty = none.
        timeout: Seconds for one exchange.
        retries: Further attempts after the first.
        backoff: Seconds before the second attempt, doubled for each further one.
    """

    url: str
    api_key: str = ""
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"url must be an address such as http://localhost:8000/v1, got {self.url!r}")
        if parts.username or parts.password:
            raise UserError("leave user and password out of the url, which is saved with a run; set api_key_env")
        if not self.timeout > 0:
            raise UserError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if self.retries < 0 or not self.backoff >= 0:
            raise UserError(f"retries and backoff must be at least 0, got {self.retries} and {self.backoff}")

    def complete(self, body: dict[str, object]) -> dict[str, object]:
        """The reply of /chat/completions.

        Raises:
            ChatError: It failed for good.
        """
        return self._ask("/chat/completions", json.dumps(body).encode())

    def models(self) -> list[str]:
        """Names of the models served; empty when the server does not tell.

        Raises:
            ChatError: There is no such server, or it refuses the key.
        """
        try:
            listed = self._ask("/models", None).get("data")
        except _MissingPageError:
            return []
        entries = listed if isinstance(listed, list) else []
        return [str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry]

    def _ask(self, page: str, body: bytes | None) -> dict[str, object]:
        address = self.url.rstrip("/") + page
        for attempt in range(self.retries + 1):
            try:
                return self._ask_once(address, body)
            except _TransientError as error:
                if attempt == self.retries:
                    tries = "1 attempt" if attempt == 0 else f"{attempt + 1} attempts"
                    raise ChatError(f"{address}: {error} ({tries}, {self.timeout:g} s each)") from error
                time.sleep(min(max(self.backoff * 2**attempt, error.pause), MAX_PAUSE_SECONDS))
        raise AssertionError("unreachable")

    def _ask_once(self, address: str, body: bytes | None) -> dict[str, object]:
        request = urllib.request.Request(address, data=body, headers=self._headers())
        limit = TimeLimit(self.timeout)
        try:
            with limit:
                text = self._open(request, limit)
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            late = "no whole reply in time: " if limit.passed else ""
            raise _TransientError(f"{late}{type(error).__name__}: {shown(reason)}") from error
        if limit.passed:  # a body without a length ends quietly
            raise _TransientError("the reply did not end in time")
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _TransientError(f"the reply is not JSON: {text[:80]!r}") from error
        if not isinstance(reply, dict):
            raise ChatError(f"{address}: the reply is a JSON {type(reply).__name__}, not an object")
        return reply

    def _open(self, request: urllib.request.Request, limit: TimeLimit) -> bytes:
        try:
            with self._opener(limit).open(request, timeout=self.timeout) as response:
                return _read(response)
        except urllib.error.HTTPError as error:
            raise self._explain(request.full_url, error) from error

    def _explain(self, address: str, error: urllib.error.HTTPError) -> Exception:
        try:
            said = shown(" ".join(_read(error).decode(errors="replace").split()))
        except (OSError, http.client.HTTPException, _TransientError):
            said = ""
        message = f"status {error.code} {shown(error.reason)}: {said}".rstrip(": ")
        if error.code in _TRANSIENT or error.code >= 500:
            after = error.headers.get("Retry-After", "")
            return _TransientError(message, pause=float(after) if after.isdigit() else 0.0)
        if error.code in (401, 403):
            return ChatError(f"{address}: {message}; set api_key_env to the environment variable that holds the key")
        kind = _MissingPageError if error.code in (404, 405) else ChatError
        return kind(f"{address}: {message}")

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", "Accept": "application/json", **key}

    def _opener(self, limit: TimeLimit) -> urllib.request.OpenerDirector:
        is_local = urlsplit(self.url).hostname in _LOOPBACK
        proxies = urllib.request.ProxyHandler({} if is_local else None)  # None: those of the environment
        return urllib.request.build_opener(_NoRedirect(), proxies, _Http(limit), _Https(limit))


class _MissingPageError(ChatError):
    """The server has no such page."""


def _read(response: http.client.HTTPResponse | urllib.error.HTTPError) -> bytes:
    """The body, within the size allowed."""
    text = response.read(MAX_REPLY_BYTES + 1)
    if len(text) > MAX_REPLY_BYTES:
        raise ChatError(f"{response.url}: the reply is longer than {MAX_REPLY_BYTES >> 20} MB")
    return text
