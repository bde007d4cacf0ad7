"""Servers that die, lie and dawdle: real sockets, and a client that waits within its limit and says why it stops."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rewards import RewardError, resolve
from rewards.serving.client import Client, Patience

HEALTH = {
    "ready": True,
    "rewards": {"r": {"hash": "h1", "package_version": "0", "versions": {}, "description": "", "range": None}},
    "limits": {"max_body_mb": 10},
}
GOOD = {"reward": {"name": "r", "hash": "h1"}, "scores": [1.0, 2.0], "components": {}}


@pytest.fixture
def server():
    """A server that answers posts from a list of (status, body); the last answer repeats."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(*self.server.health)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.server.posts += 1
            answers = self.server.answers
            self.reply(*(answers.pop(0) if len(answers) > 1 else answers[0]))

        def reply(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            for start in range(0, len(data), 4 if self.server.drip else len(data) or 1):
                self.wfile.write(data[start : start + 4] if self.server.drip else data)
                self.wfile.flush()
                time.sleep(self.server.drip)

        def log_message(self, *arguments):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.health, made.answers, made.posts, made.drip = (200, HEALTH), [(200, GOOD)], 0, 0.0
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def connect(server, **options):
    url = f"http://127.0.0.1:{server.server_port}"
    return resolve("remote", options={"url": url, "reward": "r", "timeout": 10, "max_wait": 0.6, **options})


def score(reward):
    return reward(torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}]).total.tolist()


def test_what_may_pass_is_tried_again(server, caplog):
    busy = {"error": {"kind": "busy", "message": "full"}}
    server.answers = [(502, b"<html>"), (503, busy), (200, GOOD)]
    assert score(connect(server, max_wait=20)) == [1.0, 2.0]
    assert server.posts == 3
    assert "trying again" in caplog.text
    assert "full" in caplog.text


@pytest.mark.parametrize("answer", [b"<html>oops</html>", b"", b"\x80\x04\x95", b"[1, 2]"])
def test_garbage_is_given_time_and_then_ends_the_run(server, answer):
    server.answers = [(200, answer)]
    with pytest.raises(RewardError, match="reward 'r'.*gave up after 0.6 s and") as caught:
        score(connect(server))
    assert server.posts >= 2
    assert caught.value.__cause__ is None or "raised" not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({**GOOD, "scores": [1.0]}, "1 numbers for 2 images"),
        ({**GOOD, "scores": [1.0, float("nan")]}, "not a finite"),
        ({**GOOD, "scores": [1.0, "2"]}, "must be a number"),
        ({**GOOD, "reward": {"name": "r", "hash": "h2"}}, "another reward than at the start.*resume"),
        ({"answer": 42}, "must have reward"),
    ],
)
def test_wrong_content_ends_the_run_at_once(server, reply, reason):
    server.answers = [(200, reply)]
    with pytest.raises(RewardError, match=reason):
        score(connect(server, max_wait=60))
    assert server.posts == 1


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_refusals_are_final_and_carry_the_message(server, status):
    server.answers = [(status, {"error": {"kind": "k", "message": "for this reason"}})]
    with pytest.raises(RewardError, match=f"status {status}: for this reason"):
        score(connect(server, max_wait=60))
    assert server.posts == 1


def test_redirections_are_not_followed(server):
    server.answers = [(302, b"")]
    with pytest.raises(RewardError, match="status 302"):
        score(connect(server))


def test_a_reply_that_comes_in_drops_meets_the_time_limit(server):
    reward = connect(server, timeout=0.5)
    server.drip = 0.2
    with pytest.raises(RewardError, match=r"no answer within"):
        score(reward)


def test_a_server_that_is_gone_is_waited_for_and_then_named(server):
    reward = connect(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=rf"127.0.0.1:{server.server_port}: no answer .*refused.*; gave up after"):
        score(reward)


def test_a_server_that_comes_back_is_used_again(server):
    reward = connect(server, max_wait=20)
    server.answers = [(503, b""), (200, GOOD)]
    assert score(reward) == [1.0, 2.0]


def test_a_server_that_is_not_ready_is_waited_for(server):
    server.health = (503, {"error": {"kind": "stuck", "message": "hangs"}})
    with pytest.raises(RewardError, match="hangs; gave up"):
        connect(server)


@pytest.mark.parametrize("health", [{"ready": True}, {**HEALTH, "limits": {}}, {**HEALTH, "rewards": {"r": 3}}])
def test_another_service_at_the_address_is_recognised(server, health):
    server.health = (200, health)
    with pytest.raises(RewardError, match="health"):
        connect(server)


@pytest.mark.parametrize(
    "url", ["gpu:8000", "ftp://x", "http://", "http://u:p@h", "http://h:x", "http://h?a=b", "file:///etc/passwd"]
)
def test_addresses_are_checked(url):
    with pytest.raises(ValueError, match="url"):
        Client(url, token="", patience=Patience(timeout=1, max_wait=1), label="reward 'r'")


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": "5"}, {"max_wait": True}, {"batch_size": -1}, {"concurrency": 0},
     {"precision": "int8"}, {"reward": " "}, {"token_env": ""}],
)  # fmt: skip
def test_options_are_checked_before_anything_is_asked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        resolve("remote", options={"url": "http://127.0.0.1:9", "reward": "r", **options})
