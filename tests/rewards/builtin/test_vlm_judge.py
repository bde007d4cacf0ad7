"""The judge against a real HTTP server that speaks the protocol of vLLM, and one that misbehaves in every way."""

import base64
import io
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardError, UserError, resolve
from rewards.builtin.vlm_judge import read_grade, yes_probability
from rewards.models.chat_client import ChatClient, ChatError

MODEL = "judge-7b"


def logprobs(**probabilities):
    tokens = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in probabilities.items()]
    return {"content": [{"token": tokens[0]["token"], "logprob": tokens[0]["logprob"], "top_logprobs": tokens}]}


def completion(content, logs=None):
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "logprobs": logs}]}


def picture_of(request):
    part = request["messages"][0]["content"][0]
    assert part["type"] == "image_url"
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def honest(request, number):
    """Yes with the probability of the picture's red; or the red as a grade."""
    red = np.asarray(picture_of(request))[..., 0].mean() / 255
    if request.get("logprobs"):
        assert request["max_tokens"] == 1 and request["top_logprobs"] == 20
        return 200, completion(
            "Yes", logprobs(**{"Yes": 0.5 * red, " yes": 0.3 * red, "No": 0.8 * (1 - red), "I": 0.2})
        )
    return 200, completion(f" {1 + round(9 * red)}\n")


@pytest.fixture
def serve():
    """Starts servers that answer with `behaviour(request, number) -> (status, reply)`; the reply an object or bytes."""
    servers = []

    def start(behaviour, models=(MODEL,)):
        seen, count = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                page = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
                self.answer(*((200, page) if self.path == "/v1/models" and models else (404, {"detail": "Not Found"})))

            def do_POST(self):
                assert self.path == "/v1/chat/completions"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with count:
                    seen.append((request, dict(self.headers)))
                    number = len(seen)
                self.answer(*behaviour(request, number))

            def answer(self, status, reply, headers=()):
                body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:
                    self.close_connection = True  # the client gave up

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge(url, **options):
    return resolve(
        "vlm_judge", options={"url": url, "model": MODEL, "retries": 2, "backoff": 0.0, "timeout": 5.0} | options
    )


def reds(*levels):
    images = torch.zeros(len(levels), 3, 8, 8)
    images[:, 0] = torch.tensor(levels).view(-1, 1, 1)
    return images


def ask(reward, images):
    return reward(images, [f"picture {n}" for n in range(len(images))], [{}] * len(images))


# ------------------------------------------------------------------------------------------------------ what is asked


def test_yes_no_is_the_share_of_yes_over_all_its_spellings(serve):
    url, seen = serve(honest)
    scores = ask(judge(url), reds(0.2, 0.6, 0.8))
    assert scores.total.tolist() == pytest.approx([0.2, 0.6, 0.8], abs=1e-4)
    assert scores.components["mass"].tolist() == pytest.approx([0.8] * 3, abs=1e-4)
    request, headers = seen[0]
    assert request["model"] == MODEL and request["temperature"] == 0
    assert "structured_outputs" not in request and "Authorization" not in headers


def test_grades_are_mapped_to_the_unit_interval(serve):
    url, seen = serve(honest)
    scores = ask(judge(url, mode="grade", structured_outputs=True), reds(0.0, 0.55, 1.0))
    assert scores.total.tolist() == pytest.approx([0, 5 / 9, 1])
    assert scores.components["grade"].tolist() == [1, 6, 10]
    assert seen[0][0]["structured_outputs"] == {"choice": ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]}
    assert "logprobs" not in seen[0][0]


def test_the_picture_arrives_pixel_by_pixel_and_the_prompt_in_the_template(serve):
    url, seen = serve(honest)
    image = (torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    judge(url, template='Braces {prompt}? "{prompt}"')(image, ["a {odd} cup"], [{}])
    sent = np.asarray(picture_of(seen[0][0]))
    assert np.array_equal(sent, (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    assert seen[0][0]["messages"][0]["content"][1] == {"type": "text", "text": 'Braces a {odd} cup? "a {odd} cup"'}


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    url, seen = serve(honest)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ask(judge(url, api_key_env="JUDGE_KEY"), reds(0.5))
    assert seen[0][1]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY is not set"):
        judge(url, api_key_env="JUDGE_KEY")


def test_requests_run_at_the_same_time_up_to_the_limit_and_keep_their_order(serve):
    running, most, lock = 0, 0, threading.Lock()
    barrier = threading.Barrier(3, timeout=10)

    def together(request, number):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        barrier.wait()  # three must be here at once, or nobody goes on
        with lock:
            running -= 1
        return honest(request, number)

    url, _ = serve(together)
    levels = [n / 10 for n in range(1, 10)]
    scores = ask(judge(url, concurrency=3), reds(*levels))
    assert scores.total.tolist() == pytest.approx(levels, abs=0.01)
    assert most == 3


# ---------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    "fault",
    [
        (500, {"error": "out of memory"}),
        (503, b"loading"),
        (429, {"error": "busy"}),
        (200, b"<html>gateway</html>"),
        (200, b""),
        (200, b'{"choices": [{"mess'),
    ],
)
def test_what_may_pass_is_tried_again(serve, fault):
    url, seen = serve(lambda request, number: honest(request, number) if number > 2 else fault)
    assert ask(judge(url), reds(0.5)).total.item() == pytest.approx(0.5, abs=0.01)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        ((500, {"error": "out of memory"}), r"status 500 .*out of memory.*\(2 attempts, 5 s each\)", 2),
        ((200, b"<html>"), r"the reply is not JSON: b'<html>' \(2 attempts", 2),
        ((400, {"error": "no such model"}), "status 400 .*no such model", 1),
        ((401, {"error": "who?"}), "status 401 .*set api_key_env", 1),
        ((200, [1, 2]), "a JSON list, not an object", 1),
        ((200, {"ok": True}), "the reply has no choices: {'ok': True}", 1),
        ((200, completion("Yes")), "no top_logprobs .*vLLM: --max-logprobs 20", 1),
        ((200, completion("I", logprobs(I=0.5, The=0.4))), "neither yes nor no .*'I', 'The'", 1),
        (
            (200, completion("Y", {"content": [{"top_logprobs": [{"token": "yes", "logprob": 3}]}]})),
            "not a token with",
            1,
        ),
        ((200, completion("Y", {"content": [{"top_logprobs": ["yes"]}]})), "not a token with", 1),
        ((200, b'"' + b"x" * (5 << 20) + b'"'), "longer than 4 MB", 1),
    ],
)
def test_what_will_not_pass_ends_with_its_reason(serve, fault, message, requests):
    url, seen = serve(lambda request, number: fault)
    reward = judge(url, retries=1).function
    with pytest.raises(ChatError, match=message):
        reward(reds(0.5), ["a cup"], [{}])
    assert len(seen) == requests


def test_a_failure_is_a_reward_error_that_names_the_sample_and_stops_the_other_requests(serve):
    url, seen = serve(lambda request, number: (400, {"error": "bad"}))
    with pytest.raises(RewardError, match="'vlm_judge' raised ChatError.*prompt 'picture 0'"):
        ask(judge(url, concurrency=1), reds(*[0.5] * 6))
    assert len(seen) <= 3  # of 6: the first, perhaps one on its way already, and the first again to name the sample


def test_a_server_that_hangs_is_given_up_on_in_time(serve):
    release = threading.Event()

    def hang(request, number):
        release.wait(10)
        return honest(request, number)

    url, _ = serve(hang)
    try:
        with pytest.raises(ChatError, match=r"(timed out|in time).*2 attempts, 0.2 s each"):
            judge(url, retries=1, timeout=0.2).function(reds(0.5), [""], [{}])
    finally:
        release.set()


def test_a_server_that_trickles_is_given_up_on_in_time():
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def trickle():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    threading.Thread(target=trickle, daemon=True).start()
    client = ChatClient(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=0.3, retries=0)
    try:
        with pytest.raises(ChatError, match="in time"):
            client.complete({})
    finally:
        stop.set()
        listener.close()


def test_redirects_are_refused_so_that_the_key_stays_here(serve):
    other, seen = serve(honest)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(307)
            self.send_header("Location", f"{other}/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        client = ChatClient(url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key="secret")
        with pytest.raises(ChatError, match="status 307"):
            client.complete({})
    finally:
        server.shutdown()
        server.server_close()
    assert not seen


def test_pauses_double_and_respect_what_the_server_asks_for(serve, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    url, _ = serve(lambda request, number: (503, b""))
    client = ChatClient(url=url, retries=4, backoff=8.0)
    with pytest.raises(ChatError, match="5 attempts"):
        client.complete({})
    assert pauses == [8, 16, 32, 60]


# ------------------------------------------------------------------------------------------ found before a run begins


def test_a_wrong_address_model_or_option_is_found_at_the_start(serve):
    url, seen = serve(honest, models=("other-model", "third"))
    with pytest.raises(ValueError, match="serves other-model, third, not 'judge-7b'"):
        judge(url)
    silent, _ = serve(honest, models=())
    assert ask(judge(silent), reds(0.5)).total.item() == pytest.approx(0.5, abs=0.01)  # a server without that page
    with pytest.raises(ValueError, match="'vlm_judge': no answer from the server.*refused.*1 attempt"):
        judge("http://127.0.0.1:9/v1", retries=0)
    assert not seen
    for options, message in [
        ({"mode": "rank"}, "mode must be one of yes_no, grade, got 'rank'"),
        ({"template": "Is it {wieght}?"}, r"the template holds \{wieght\}; only \{prompt\}"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"timeout": 0}, "timeout must be a positive number"),
        ({"retries": -1}, "retries and backoff must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            judge(url, **options)
    for address in ("file:///etc/passwd", "localhost:8000", "ftp://host/v1", ""):
        with pytest.raises(ValueError, match="url must be an address such as"):
            judge(address)
    with pytest.raises(UserError, match="leave user and password out of the url") as caught:
        judge("http://me:hunter2@localhost:8000/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("content", "grade"), [("7", 7), (" 10 ", 10), ("3/10", 3), ("8.", 8), ("1", 1)])
def test_a_grade_is_a_whole_number_and_nothing_else(content, grade):
    assert read_grade(completion(content)) == grade


@pytest.mark.parametrize("content", ["", "11", "0", "-3", "7.5", "I give 7", "seven", "7 because", None, "1 2"])
def test_other_replies_are_no_grades(content):
    with pytest.raises(ChatError, match="not a whole number from 1 to 10"):
        read_grade(completion(content))


def test_an_impossible_token_counts_for_nothing():
    reply = completion("yes", logprobs(yes=0.25, no=0.75))
    reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"].append({"token": "YES", "logprob": -9999.0})
    assert yes_probability(reply) == (pytest.approx(0.25), pytest.approx(1.0))
