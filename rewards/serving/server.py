"""An HTTP server for rewards: `ddpo rewards serve`. Another process, environment, machine or device then scores.

    POST /v1/score    images in, scores out; the format is in `rewards.serving.wire`
    GET  /health      {"ready", and with the token "rewards", "versions", "limits"}; 503 while a reward hangs

Every request is checked in this order, each answer a structured error: token (401), media type (415), announced size
(413), room in the queue (503), actual size (413), time (504, which includes sending the body), format (400), name
(404), whether that reward hangs (503). A reward that raises is 422 with its message; the server lives on. SIGTERM and
SIGINT finish what was accepted, then end with status 0. Connections that ask for nothing are closed. Needs the extra
`serve`; imports nothing of diffusion or training.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from socket import socket
from types import FrameType
from typing import TYPE_CHECKING, final

from rewards.base import RewardError, Scores, UserError
from rewards.identity import Identity
from rewards.models.http_limits import shown
from rewards.optional import require
from rewards.reward import Reward
from rewards.serving.batching import Batcher
from rewards.serving.connections import Connections
from rewards.serving.wire import (
    HEALTH_PATH,
    JSON,
    SAFETENSORS,
    SCORE_PATH,
    ScoreRequest,
    WireError,
    decode_request,
    encode_reply,
)

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse

_LOG = logging.getLogger(__name__)
_CLOSING_SECONDS, _SILENT_SECONDS = 5.0, 30.0
_LOGGED_LETTERS = 2000  # of a failure, whose text has parts that a client sent
_UNAUTHORIZED = "the token is missing or wrong; send Authorization: Bearer TOKEN"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server accepts.

    Attributes:
        max_batch: Images up to which concurrent requests are joined into one call; 1 joins none.
        max_delay: Seconds that a request waits for others to be joined.
        max_body_mb: Largest body of a request, in units of 1,000,000 bytes.
        timeout: Seconds from the start of a request to its answer.
        max_queue: Requests that are read or wait at the same time.
    """

    max_batch: int = 64
    max_delay: float = 0.002
    max_body_mb: float = 64.0
    timeout: float = 120.0
    max_queue: int = 64

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_body_mb", "timeout", "max_queue"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_delay < 0:
            raise UserError(f"max_delay must not be negative, got {self.max_delay}")

    @property
    def max_body_bytes(self) -> int:
        """The largest body in bytes."""
        return int(self.max_body_mb * 1_000_000)


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


@final
class RewardService:
    """Answers requests for a fixed set of rewards.

    Args:
        rewards: What is served, with the identity that replies carry.
        limits: What is accepted.
        token: What clients must present; None = anyone.
    """

    def __init__(
        self, rewards: Sequence[tuple[Reward, Identity]], *, limits: Limits | None = None, token: str | None = None
    ) -> None:
        self.limits = limits or Limits()
        self._token = token
        self._identities = {reward.name: identity for reward, identity in rewards}
        if len(self._identities) != len(rewards):
            served = [reward.name for reward, _ in rewards]
            raise UserError(f"each reward can be served once, or under labels (LABEL=NAME), got {served}")
        self._batchers = {
            reward.name: Batcher(
                reward,
                max_batch=1 if reward.groupwise else self.limits.max_batch,  # a request is one group, whole
                max_delay=self.limits.max_delay,
            )
            for reward, _ in rewards
        }
        self._about = {reward.name: _describe(reward, identity) for reward, identity in rewards}
        self._open = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        applications = require("starlette.applications", extra="serve", reward="server")
        routing = require("starlette.routing", extra="serve", reward="server")
        routes = [
            routing.Route(SCORE_PATH, self._answer_score, methods=["POST"]),
            routing.Route(HEALTH_PATH, self._answer_health, methods=["GET"]),
        ]
        return applications.Starlette(routes=routes)

    def close(self) -> bool:
        """Takes no more requests and ends the threads; False when a reward hangs."""
        ended = [batcher.close(patience=_CLOSING_SECONDS) for batcher in self._batchers.values()]
        return all(ended)

    def health(self) -> dict[str, object]:
        """Everything about the server: what it serves, whether a reward hangs, versions, limits."""
        stuck = [name for name, batcher in self._batchers.items() if batcher.busy_seconds > self.limits.timeout]
        versions = next(iter(self._identities.values())).versions if self._identities else {}
        return {
            "ready": not stuck,
            "stuck": stuck,
            "rewards": self._about,
            "versions": versions,
            "limits": {"max_body_mb": self.limits.max_body_mb, "timeout": self.limits.timeout},
        }

    # ------------------------------------------------------------------------------------------ answers

    async def _answer_health(self, request: Request) -> JSONResponse:
        admitted = self._admits(request)
        if not admitted and "authorization" in request.headers:
            return _refuse(401, "unauthorized", _UNAUTHORIZED)
        health = self.health()
        if not health["ready"]:
            return _refuse(503, "stuck", self._stuck("a reward"))
        return _respond(health if admitted else {"ready": True}, 200)

    async def _answer_score(self, request: Request) -> JSONResponse:
        disconnected = require("starlette.requests", extra="serve", reward="server").ClientDisconnect
        try:
            self._check(request)
            self._open += 1
            try:
                return _respond(await self._score(request), 200)
            finally:
                self._open -= 1
        except _Refused as error:
            return _refuse(error.status, error.kind, str(error))
        except WireError as error:
            return _refuse(400, "bad_request", str(error))
        except RewardError as error:
            _LOG.warning("%s", shown(error, letters=_LOGGED_LETTERS))
            return _refuse(422, "reward_failed", str(error))
        except TimeoutError:
            return _refuse(504, "timeout", f"not scored within {self.limits.timeout:g} s (the server's --timeout)")
        except disconnected:
            return _refuse(400, "bad_request", "the connection ended inside the body")

    def _admits(self, request: Request) -> bool:
        """Compares in a time that does not depend on how much of the token is right."""
        if self._token is None:
            return True
        given = request.headers.get("authorization", "").encode()
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    def _check(self, request: Request) -> None:
        """What can be said before the body is read."""
        if not self._admits(request):
            raise _Refused(401, "unauthorized", _UNAUTHORIZED)
        media = _media_type(request)
        if media not in (SAFETENSORS, JSON):
            raise _Refused(415, "media_type", f"the body must be {SAFETENSORS} or {JSON}, got {media or 'no type'!r}")
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self.limits.max_body_bytes:
            raise self._too_large(f"{int(announced) / 1e6:.1f} MB")
        if self._open >= self.limits.max_queue:
            raise _Refused(503, "busy", f"{self._open} requests are waiting already (the server's --max-queue)")

    async def _score(self, request: Request) -> dict[str, object]:
        future: Future[Scores] | None = None
        try:
            async with asyncio.timeout(self.limits.timeout):
                body = await self._read(request)
                wanted = await asyncio.to_thread(
                    decode_request, body, _media_type(request), max_bytes=self.limits.max_body_bytes
                )
                del body
                future = self._submit(wanted)
                scores = await asyncio.wrap_future(future)
        finally:
            if future is not None:
                future.cancel()  # no effect once it runs or is done
        identity = self._identities[wanted.reward]
        return encode_reply(scores, name=identity.name, hash=identity.hash, package_version=identity.package_version)

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.limits.max_body_bytes:
                raise self._too_large("more")
        return bytes(body)

    def _submit(self, wanted: ScoreRequest) -> Future[Scores]:
        if wanted.reward not in self._batchers:
            raise _Refused(
                404, "unknown_reward", f"{wanted.reward!r} is not served here; {', '.join(self._batchers)} are"
            )
        batcher = self._batchers[wanted.reward]
        if batcher.busy_seconds > self.limits.timeout:
            raise _Refused(503, "stuck", self._stuck(f"reward {wanted.reward!r}"))
        try:
            return batcher.submit(wanted.images, wanted.prompts, wanted.metadata)
        except RuntimeError as error:
            raise _Refused(503, "closing", str(error)) from error

    def _stuck(self, what: str) -> str:
        return f"{what} has not returned for {self.limits.timeout:g} s; restart the server"

    def _too_large(self, size: str) -> _Refused:
        limit = f"{self.limits.max_body_mb:g} MB"
        return _Refused(413, "too_large", f"the body may have {limit} (the server's --max-body-mb), got {size}")


def run(service: RewardService, listener: socket, *, started: Callable[[], None]) -> bool:
    """Serves until SIGTERM or SIGINT, then finishes what was accepted; only in the main thread.

    Args:
        service: What to serve.
        listener: A bound socket.
        started: Called once requests are answered.

    Returns:
        False when a reward hangs, so that its thread is still there.
    """
    library = require("uvicorn", extra="serve", reward="server")
    protocols = require("uvicorn.protocols.http.auto", extra="serve", reward="server")
    room = 4 * service.limits.max_queue
    connections = Connections(patience=min(service.limits.timeout, _SILENT_SECONDS), most=room // 2)
    config = library.Config(
        connections.application(service.app()), http=connections.protocol(protocols.AutoHTTPProtocol),
        log_level="warning", access_log=False, lifespan="off", server_header=False, proxy_headers=False, ws="none",
        timeout_graceful_shutdown=int(service.limits.timeout) + 1, timeout_keep_alive=30, limit_concurrency=room,
    )  # fmt: skip
    server = library.Server(config)
    previous = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(_serve(server, listener, started))
        return service.close()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


async def _serve(server: uvicorn.Server, listener: socket, started: Callable[[], None]) -> None:
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if server.started:
        started()
    await task


def _ignore(number: int, frame: FrameType | None) -> None:
    """Takes the signal that uvicorn raises again after it has shut down in order."""


def _describe(reward: Reward, identity: Identity) -> dict[str, object]:
    bounds = None if reward.range is None else [repr(float(bound)) for bound in reward.range]
    about = {"hash": identity.hash, "package_version": identity.package_version, "versions": identity.versions}
    return {**about, "description": reward.description, "range": bounds, "groupwise": reward.groupwise}


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _refuse(status: int, kind: str, message: str) -> JSONResponse:
    return _respond({"error": {"kind": kind, "message": message}}, status)


def _respond(content: Mapping[str, object], status: int) -> JSONResponse:
    responses = require("starlette.responses", extra="serve", reward="server")
    return responses.JSONResponse(dict(content), status_code=status)
