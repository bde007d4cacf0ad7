"""Servers and clients against peers that mean no good, and files that grow when they are read."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from rewards import RewardError
from rewards.registry import resolve
from tests.faults.choice import Choice
from tests.faults.runs import child, is_refused
from tests.faults.table import Case
from tests.trainers.loop_helpers import environment
from trainers.cli import main

SERVER_TIMEOUT, TRY_SECONDS, WAIT_SECONDS = 4, 1, 2


def peers(folder: Path, choice: Choice) -> Iterator[Case]:
    """Tries each peer; the server, which takes seconds to start, only where the choice is not quick."""
    for fault, what, attempt in _attempts(folder, quick=choice.quick):
        if choice.takes(fault, what):
            yield Case(fault=fault, what=what, problem=attempt())


def _attempts(folder: Path, *, quick: bool) -> Iterator[tuple[str, str, Callable[[], str]]]:
    if not quick:
        yield "server: 300 connections, silent or with half a header", "health", _silent
    for name, text in _bombs():  # before any thread is started: these are forked
        (folder / "bomb.yaml").write_text(text)
        yield "configuration that grows or nests", name, partial(_bomb, folder / "bomb.yaml")
    yield "client: 100 Continue without end", "remote reward", partial(_dripping, b"HTTP/1.1 100 Continue\r\n\r\n")
    yield "client: headers that drip", "remote reward", partial(_dripping, b"X-Drip: 1\r\n")


def _silent() -> str:
    """A reward server whose connections are taken by peers that send nothing, after its time limit."""
    with _served() as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for one in silent[::2]:
            one.sendall(b"GET /health HTTP/1.1\r\n")
        time.sleep(2 * SERVER_TIMEOUT)
        try:
            status = _health(port)
        except OSError as error:
            return f"locked out: {error}"
        finally:
            for one in silent:
                one.close()
        return "" if status == 200 else f"status {status}"


def _health(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/health")
    return connection.getresponse().status


@contextmanager
def _served() -> Iterator[int]:
    command = [sys.executable, "-m", "trainers", "rewards", "serve", "jpeg_compressibility", "--port", "0"]
    given = {**environment(), "DDPO_REWARD_TOKEN": "Abcdefghijklmnopqrstuvwx"}
    server = subprocess.Popen(
        [*command, "--timeout", str(SERVER_TIMEOUT)], env=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        yield int(ready["url"].rpartition(":")[2])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def _dripping(drip: bytes) -> str:
    """A remote reward whose server answers a request by something that never ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    health = {"ready": True, "rewards": {"r": {"hash": "h", "versions": {}}}, "limits": {"max_body_mb": 64}}
    threading.Thread(target=_drip_to_all, args=(listener, json.dumps(health).encode(), drip), daemon=True).start()
    options = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "reward": "r"}
    started = time.monotonic()
    try:
        reward = resolve("remote", options={**options, "timeout": TRY_SECONDS, "max_wait": WAIT_SECONDS})
        reward(torch.rand(1, 3, 8, 8), ["p"], [{}])
    except RewardError as error:
        seconds = time.monotonic() - started
        slow = f"took {seconds:.0f} s with timeout {TRY_SECONDS} and max_wait {WAIT_SECONDS}"
        return slow if seconds > 5 * WAIT_SECONDS else "" if "gave up" in str(error) else str(error)
    finally:
        listener.close()
    return "it scored"


def _drip_to_all(listener: socket.socket, health: bytes, drip: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_drip_to, args=(connection, health, drip), daemon=True).start()


def _drip_to(connection: socket.socket, health: bytes, drip: bytes) -> None:
    try:
        if connection.recv(99_999).startswith(b"GET"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(health) + health)
            connection.close()
            return
        if not drip.startswith(b"HTTP"):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(60):
            connection.sendall(drip)
            time.sleep(0.25)
    except OSError:
        return


def _bombs() -> Iterator[tuple[str, str]]:
    levels = "abcdefg"
    grows = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for below, level in zip(levels, levels[1:], strict=False):
        grows += f"{level}: &{level} [{','.join([f'*{below}'] * 9)}]\n"
    yield "aliases of aliases", grows
    yield "a list that holds itself", "rewards: &a [*a]\n"
    yield "3,000 open brackets", "x: " + "[" * 3000 + "\n"


def _bomb(file: Path) -> str:
    """`ddpo plan` of such a file, in 2 GiB more than the process has."""

    def plan() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
        signal.alarm(30)
        return main(["plan", str(file)])

    ended = child(plan)
    return "" if is_refused(ended) else f"status {ended.status}: {ended.said.strip().splitlines()[-1:]}"
