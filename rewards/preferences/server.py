"""The labelling page: a small HTTP server on this machine alone.

    GET  /                      the page: one HTML file, no other files, nothing from elsewhere
    GET  /state                 JSON: the pair to decide now and the progress
    GET  /picture/N/left|right  a picture of pair N as PNG; files are named by pair, never by path
    POST /choose                {"pair": N, "choice": "left" | "right" | "tie" | "skip"}, answers as /state; 409 when
                                N is not the pair to decide now
    POST /undo                  {}, answers as /state

It binds to 127.0.0.1. So that a page of another site open in the same browser can neither read nor choose, requests
must name this host (no DNS rebinding), and posts must be JSON (no cross-site form) from this origin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BytesIO
from typing import cast, final

from rewards.base import UserError
from rewards.images.picture import open_rgb
from rewards.preferences.labels import CHOICES, Choice, LabelSession, Progress, StaleChoice

HOST = "127.0.0.1"
_MAX_BODY = 4096
_POLICY = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


@final
class LabelServer(ThreadingHTTPServer):
    """Serves a session until `shutdown`.

    Args:
        session: What is labelled.
        port: Of 127.0.0.1; 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, session: LabelSession, *, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.session = session
        self.page = files("rewards.preferences").joinpath("page.html").read_bytes()

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_port}/"


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server_version = "ddpo"
    sys_version = ""
    timeout = 30  # seconds a silent client may hold a thread

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: progress is on the page."""

    @property
    def _labelling(self) -> LabelServer:
        return cast(LabelServer, self.server)

    def _answer(self, action: Callable[[], None]) -> None:
        try:
            self._check_host()
            action()
        except _Refused as refused:
            self._send_json({"error": str(refused)}, status=refused.status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # ---------------------------------------------------------------------------------------------------- requests

    def _get(self) -> None:
        match self.path.split("?")[0].strip("/").split("/"):
            case [""]:
                self._send(self._labelling.page, "text/html; charset=utf-8")
            case ["state"]:
                self._send_json(describe(self._labelling.session, self._labelling.session.progress()))
            case ["picture", number, ("left" | "right") as side]:
                self._send(self._picture(number, side), "image/png")
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path}")

    def _post(self) -> None:
        body = self._body()
        session = self._labelling.session
        match self.path.strip("/"):
            case "choose":
                number, choice = body.get("pair"), body.get("choice")
                if not isinstance(number, int) or isinstance(number, bool) or choice not in CHOICES:
                    raise _Refused(HTTPStatus.BAD_REQUEST, f"needs a pair's number and one of {', '.join(CHOICES)}")
                try:
                    progress = session.choose(number, cast(Choice, choice))
                except StaleChoice:
                    state = describe(session, session.progress())
                    self._send_json(state, status=HTTPStatus.CONFLICT)
                    return
            case "undo":
                progress = session.undo()
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path}")
        self._send_json(describe(session, progress))

    def _check_host(self) -> None:
        own = {f"{name}:{self._labelling.server_port}" for name in (HOST, "localhost")}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host not in own:
            raise _Refused(HTTPStatus.FORBIDDEN, f"this page is {HOST}, not {host!r}")
        if origin is not None and origin not in {f"http://{name}" for name in own}:
            raise _Refused(HTTPStatus.FORBIDDEN, f"requests from {origin!r} are refused")

    def _body(self) -> dict[str, object]:
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "posts must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "posts need a Content-Length")
        if int(length) > _MAX_BODY:
            self.close_connection = True
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"posts are at most {_MAX_BODY} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"not JSON: {error}") from error
        if not isinstance(body, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "not a JSON object")
        return body

    def _picture(self, number: str, side: str) -> bytes:
        session = self._labelling.session
        if not (number.isascii() and number.isdecimal() and int(number) < len(session.pairs)):
            raise _Refused(HTTPStatus.NOT_FOUND, f"there is no pair {number}")
        pair = session.pairs[int(number)]
        path = pair.a if session.a_is_left(int(number)) == (side == "left") else pair.b
        buffer = BytesIO()
        try:
            open_rgb(path).save(buffer, format="PNG")
        except ValueError as error:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error
        return buffer.getvalue()

    # ----------------------------------------------------------------------------------------------------- answers

    def _send_json(self, value: dict[str, object], *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status=status)

    def _send(self, content: bytes, kind: str, *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)


def describe(session: LabelSession, progress: Progress) -> dict[str, object]:
    """What /state answers."""
    prompt = "" if progress.current is None else session.pairs[progress.current].prompt
    return {**asdict(progress), "prompt": prompt}


def serve(session: LabelSession, *, port: int = 0, open_browser: bool = True) -> None:
    """Serves a session until interrupted; says where on stdout.

    Raises:
        UserError: The port is taken.
    """
    try:
        server = LabelServer(session, port=port)
    except OSError as error:
        raise UserError(f"cannot listen on {HOST}:{port} ({error.strerror}); choose another --port") from error
    sys.stdout.write(f"labelling page: {server.address}   (Ctrl-C ends; every choice is saved at once)\n")
    sys.stdout.flush()
    if open_browser:
        import webbrowser

        webbrowser.open(server.address)
    try:
        server.serve_forever()
    finally:
        server.server_close()
        done = session.progress()
        sys.stdout.write(f"\n{done.labelled} of {done.total} pairs labelled, {done.skipped} skipped\n")
