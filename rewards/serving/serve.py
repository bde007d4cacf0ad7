"""What `ddpo rewards serve` does: make the rewards, bind the address, serve.

A public address is refused without a token: whoever reaches the port could have images scored, and fill the memory.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rewards.base import UserError
from rewards.combine.weighted_sum import check_label
from rewards.identity import identify
from rewards.optional import require
from rewards.registry import resolve
from rewards.serving.server import Limits, RewardService, run
from rewards.serving.wire import TOKEN_VARIABLE

_MIN_TOKEN = 16
_LOCAL_NAMES = {"localhost", "ip6-localhost"}


def serve(
    names: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    token_file: Path | None = None,
    limits: Limits | None = None,
    ends_with_parent: bool = False,
    announce: Callable[[str], None],
) -> None:
    """Serves rewards until SIGTERM or SIGINT.

    Args:
        names: Rewards in any form `rewards.resolve` understands, each optionally with options, `NAME={"option": 1}`,
            and with another name to be served under, `LABEL=NAME`.
        host: Address to bind.
        port: Port to bind; 0 takes a free one.
        device: For rewards with weights.
        token_file: File that holds the token and nothing else; the variable DDPO_REWARD_TOKEN when None, else no token.
        limits: What is accepted.
        ends_with_parent: End when standard input closes, which it does when the process that started this one is gone.
        announce: Called with a line of JSON, `{"url", "rewards"}`, once requests are answered.

    Raises:
        UserError: No reward, an unusable address, a public one without a token, or a weak token.
        ImportError: A package is missing.
    """
    if not names:
        raise UserError("name at least one reward to serve (ddpo rewards list shows them)")
    for module in ("uvicorn", "starlette", "safetensors"):
        require(module, extra="serve", reward="server")
    token = read_token(token_file)
    check_exposure(host, token)
    with bind(host, port) as listener:
        rewards = []
        for label, spec in map(split_label, names):
            name, options = split_options(spec)
            reward = resolve(name, device=device, options=options)
            reward = replace(reward, name=label or reward.name)
            rewards.append((reward, identify(reward, options=options)))
        service = RewardService(rewards, limits=limits, token=token)
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        if ends_with_parent:
            threading.Thread(target=_end_with_parent, daemon=True).start()
        line = json.dumps({"url": url, "rewards": [reward.name for reward, _ in rewards]})
        if not run(service, listener, started=lambda: announce(line)):
            sys.stdout.flush()
            os._exit(0)  # nothing else ends a thread that hangs


def split_label(spec: str) -> tuple[str, str]:
    """`LABEL=NAME`, with or without options, as label and the rest; the label is empty where there is none.

    Raises:
        UserError: No reward can be served under that label.
    """
    label, _, rest = spec.partition("=")
    if not rest or rest.startswith("{") or any(letter in ":/" for letter in label):  # options, or a file's name
        return "", spec
    check_label(label)
    return label, rest


def split_options(spec: str) -> tuple[str, Mapping[str, object]]:
    """`NAME={"option": 1}` as name and options.

    Raises:
        UserError: What follows `=` is no JSON object.
    """
    name, found, text = spec.partition("={")
    if not found:
        return spec, {}
    try:
        return name, json.loads("{" + text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'options of {name} must be a JSON object, as in {name}={{"threads": 2}}: {error}') from error


def read_token(file: Path | None) -> str | None:
    """The token of a file, else of the environment, else None.

    Raises:
        UserError: It is missing, short, or not printable ASCII; or others may read the file.
    """
    if file is not None:
        _check_private(file)
    text = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(TOKEN_VARIABLE, "").strip()
    if not text and file is None:
        return None
    if len(text) < _MIN_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
        where = file or TOKEN_VARIABLE
        raise UserError(
            f"the token in {where} must be at least {_MIN_TOKEN} printable ASCII characters without spaces; "
            f"make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return text


def _check_private(file: Path) -> None:
    """Refuses a token that other users of the machine can read."""
    if not file.is_file():
        raise UserError(f"--token-file: there is no file {file}")
    mode = file.stat().st_mode
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--token-file: others may read {file} (mode {stat.S_IMODE(mode):o}): chmod 600 {file}")


def check_exposure(host: str, token: str | None) -> None:
    """Refuses an address that other machines reach unless there is a token.

    Raises:
        UserError: It is refused.
    """
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host} can be reached from other machines: give a token with --token-file FILE or the variable "
            f"{TOKEN_VARIABLE}, or stay on 127.0.0.1 and tunnel (ssh -L)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; names other than localhost do not count, as they can change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in _LOCAL_NAMES


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; it listens once the server starts.

    Raises:
        UserError: The address is not this machine's, or the port is taken.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise UserError(f"cannot serve on {host} port {port}: {error.strerror or error}") from error
    return listener


def _end_with_parent() -> None:
    parent = os.dup(0)  # a reward that calls exit() closes standard input itself
    while os.read(parent, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
