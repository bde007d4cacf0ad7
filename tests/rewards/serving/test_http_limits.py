"""An HTTP exchange has one time limit, whatever the server does to stretch it; texts of a server are safe to show."""

import socket
import threading
import time

import pytest

from rewards import RewardError
from rewards.models.chat_client import ChatClient, ChatError
from rewards.models.http_limits import shown
from rewards.serving.client import Client, Patience

SECONDS = 0.5
STRETCHED = {
    "interim answers": b"HTTP/1.1 100 Continue\r\n\r\n",
    "headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40,
    "a body without a length": b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 200,
    "a body in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 40,
}


@pytest.fixture
def stretching():
    """Call with bytes to make a server that sends them one by one, again and again; returns its address."""
    stop = threading.Event()
    listeners = []

    def answer(connection, data):
        with connection:
            connection.recv(1 << 16)
            while True:
                for byte in data:
                    if stop.wait(0.01):
                        return
                    try:
                        connection.sendall(bytes([byte]))
                    except OSError:
                        return

    def accept(listener, data):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection, data), daemon=True).start()

    def make(data):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=accept, args=(listener, data), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield make
    stop.set()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize("what", STRETCHED)
def test_a_request_to_a_reward_server_ends_in_time(stretching, what):
    url = stretching(STRETCHED[what])
    client = Client(url, token="", patience=Patience(timeout=SECONDS, max_wait=0.1), label="reward 'r'")
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer within"):
        client.ask("POST", "/v1/score", body=b"x" * 1000)
    assert time.monotonic() - start < 10 * SECONDS


@pytest.mark.parametrize("what", STRETCHED)
def test_a_request_to_a_chat_server_ends_in_time(stretching, what):
    client = ChatClient(url=stretching(STRETCHED[what]), timeout=SECONDS, retries=0)
    start = time.monotonic()
    with pytest.raises(ChatError, match="in time"):
        client.complete({})
    assert time.monotonic() - start < 10 * SECONDS


def test_the_timer_of_an_exchange_ends_with_it(stretching):
    client = Client("http://127.0.0.1:9", token="", patience=Patience(timeout=SECONDS, max_wait=0.1), label="r")
    before = set(threading.enumerate())  # threads of earlier tests may end meanwhile: only new ones count
    with pytest.raises(RewardError, match="gave up"):
        client.ask("GET", "/health")
    assert not set(threading.enumerate()) - before


def test_what_a_terminal_would_obey_is_escaped_and_what_is_long_is_cut():
    assert shown("\x1b[2Jgone\nsecond\u202eline") == r"\x1b[2Jgone\nsecond\u202eline"
    assert shown("plain text, Größe") == "plain text, Größe"
    assert shown("x" * 500, letters=10) == "x" * 10 + "..."
    assert len(shown("\x1b" * 500, letters=10)) <= 13


def test_the_message_of_a_server_is_shown_escaped_and_cut():
    listener = socket.create_server(("127.0.0.1", 0))
    body = b'{"error": {"kind": "x", "message": "\\u001b[31m' + b"m" * 5000 + b'"}}'

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    threading.Thread(target=answer, daemon=True).start()
    patience = Patience(timeout=5, max_wait=0.1)
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", token="", patience=patience, label="r")
    with listener, pytest.raises(RewardError) as caught:
        client.ask("GET", "/health")
    assert r"\x1b[31mmmm" in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 2200
