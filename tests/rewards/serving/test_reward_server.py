"""A real server process: same scores as in this process, limits, tokens, and an orderly end."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rewards import RewardError, UserError, resolve
from rewards.serving.serve import check_exposure, is_loopback, read_token, split_label, split_options
from rewards.serving.wire import SAFETENSORS, encode_request

ROOT = Path(__file__).parents[3]
TOKEN = "a-token-for-this-test-only"
MINE = """
import pathlib, time, torch

def size(images, prompts, metadata):
    return torch.full((len(prompts),), float(len(prompts)))

def fussy(images, prompts, metadata):
    raise RuntimeError("out of ink")

def leaves(images, prompts, metadata):
    exit(0)

class Held:
    # Scores once the file exists that the prompt names, and makes another one to tell that it was called.
    def __init__(self, *, device):
        pass

    def __call__(self, images, prompts, metadata):
        gate = pathlib.Path(prompts[0])
        gate.with_suffix(".entered").touch()
        while not gate.exists():
            time.sleep(0.01)
        return images.mean(dim=(1, 2, 3))

class Sleepy:
    def __init__(self, *, device, factor):
        self.factor = factor

    def __call__(self, images, prompts, metadata):
        if prompts[0].startswith("sleep"):
            time.sleep(float(prompts[0].split()[1]))
        return images.mean(dim=(1, 2, 3)) * self.factor
"""


def command(*arguments):
    return [sys.executable, "-m", "trainers", "rewards", "serve", *arguments]


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DDPO_REWARD_TOKEN": TOKEN, **extra}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("server") / "mine.py"
    file.write_text(MINE)
    names = [
        "jpeg_compressibility",
        "brightness",
        "diversity",
        f"{file}:size",
        f"{file}:fussy",
        f"{file}:leaves",
        f'{file}:Sleepy={{"factor": 2}}',
        f"stubborn={file}:Held",
    ]
    limits = ["--max-body-mb", "2", "--timeout", "1.5", "--max-delay-ms", "0"]
    process = subprocess.Popen(
        command(*names, "--port", "0", *limits), env=environment(), stdout=subprocess.PIPE, text=True
    )
    line = json.loads(process.stdout.readline())
    assert line["rewards"] == [
        "jpeg_compressibility",
        "brightness",
        "diversity",
        "size",
        "fussy",
        "leaves",
        "Sleepy",
        "stubborn",
    ]
    yield line["url"]
    process.terminate()
    assert process.wait(timeout=20) == 0, "SIGTERM is an orderly end"


@pytest.fixture
def served(server, monkeypatch):
    monkeypatch.setenv("DDPO_REWARD_TOKEN", TOKEN)

    def make(name, **options):
        defaults = {"timeout": 5, "max_wait": 0.2}
        return resolve("remote", options={"url": server, "reward": name, **defaults, **options})

    return make


def post(url, body, media=SAFETENSORS, token=TOKEN, path="/v1/score", method="POST"):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        headers = {"Content-Type": media, "Authorization": f"Bearer {token}"}
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def health(url):
    return post(url, None, path="/health", method="GET")


def status(url):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def until(happens, seconds=20):
    """Waits for what will happen, and fails where it does not."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def listens(url):
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("name", ["jpeg_compressibility", "brightness"])
def test_scores_equal_those_of_this_process(served, name):
    here = resolve(name)
    for images, precision in [
        (torch.randint(0, 256, (5, 3, 24, 16)) / 255, "float16"),
        (torch.rand(5, 3, 24, 16), "float32"),
    ]:
        there = served(name, precision=precision, batch_size=2, concurrency=3)
        assert (there.name, there.range) == (name, here.range)
        expected, got = (reward(images, ["x"] * 5, [{}] * 5) for reward in (here, there))
        assert torch.equal(got.total, expected.total)


def test_a_reward_that_compares_a_group_gets_each_group_whole(served):
    images, prompts = torch.rand(6, 3, 16, 16), ["a", "b"] * 3
    there, here = served("diversity", precision="float32", batch_size=2, concurrency=3), resolve("diversity")
    expected, got = (reward(images, prompts, [{}] * 6).total for reward in (here, there))
    assert there.groupwise and torch.equal(got, expected)
    together = here(images, ["a"] * 6, [{}] * 6).total
    assert not torch.allclose(together, expected), "grouping makes a difference here"


def test_many_clients_at_once_get_their_own_scores(served):
    there = served("brightness", precision="float32")
    batches = [torch.rand(n % 4 + 1, 3, 16, 16) for n in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda images: there(images, ["x"] * len(images), [{}] * len(images)).total, batches))
    for images, scores in zip(batches, got, strict=True):
        assert torch.allclose(scores, resolve("brightness")(images, ["x"] * len(images), [{}] * len(images)).total)


def test_a_batch_goes_whole_unless_told_otherwise(served):
    images = torch.rand(5, 3, 8, 8)
    assert served("size")(images, ["x"] * 5, [{}] * 5).total.tolist() == [5.0] * 5
    split = served("size", batch_size=2)(images, ["x"] * 5, [{}] * 5).total.tolist()
    assert split == [2.0, 2.0, 2.0, 2.0, 1.0]


def test_options_reach_the_reward_and_its_identity_is_told(served):
    doubled = served("Sleepy")
    images = torch.rand(2, 3, 8, 8)
    scores = doubled(images, ["x"] * 2, [{}] * 2).total
    assert torch.allclose(scores, 2 * images.mean(dim=(1, 2, 3)), atol=1e-3)
    identity = doubled.function.describe().identity
    assert len(identity.hash) == 64
    assert identity.versions["torch"] == torch.__version__.partition("+")[0]
    assert identity.where.startswith("http://127.0.0.1:")


def test_a_reward_that_raises_is_named_and_the_server_lives_on(served):
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(RewardError, match=r"'fussy'.*422.*out of ink"):
        served("fussy")(images, ["x"] * 2, [{}] * 2)
    served("brightness")(images, ["x"] * 2, [{}] * 2)


@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"token": "another-token-of-some-length"}, 401, "unauthorized"),
        ({"token": ""}, 401, "unauthorized"),
        ({"media": "application/octet-stream"}, 415, "media_type"),
        ({"media": "text/plain"}, 415, "media_type"),
        ({"body": b"\x80\x04\x8c\x05posix\x8c\x06system\x93."}, 400, "bad_request"),
        ({"body": bytes(2_500_000)}, 413, "too_large"),
        ({"body": encode_request("nothing", torch.rand(1, 3, 4, 4), ["x"], [{}])}, 404, "unknown_reward"),
        ({"body": encode_request("brightness", torch.rand(2, 3, 4, 4), ["x"], [{}])}, 400, "bad_request"),
    ],
)
def test_wrong_requests_get_a_structured_error(server, change, status, kind):
    body = encode_request("brightness", torch.rand(1, 3, 4, 4), ["x"], [{}])
    got, reply = post(server, **{"body": body, **change})
    assert (got, reply["error"]["kind"]) == (status, kind)
    assert reply["error"]["message"]


def test_a_body_that_hides_its_size_is_cut_off(server):
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {SAFETENSORS}\r\n"
        link.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"%x\r\n%s\r\n" % (100_000, bytes(100_000))
        for _ in range(21):
            link.sendall(chunk)
        assert link.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_and_a_slow_reward_meet_the_time_limit(server):
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as link:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {SAFETENSORS}\r\n"
        link.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        slow = encode_request("Sleepy", torch.rand(1, 3, 4, 4), ["sleep 2"], [{}])
        status, reply = post(server, slow)
        assert (status, reply["error"]["kind"]) == (504, "timeout")
        assert link.recv(4096).startswith(b"HTTP/1.1 504")
    until(lambda: health(server)[0] == 200)  # the slow call ends


def test_a_reward_that_hangs_is_reported_and_refused_while_others_go_on(server, served, tmp_path):
    gate = tmp_path / "gate"
    body = encode_request("stubborn", torch.full((1, 3, 4, 4), 0.25), [str(gate)], [{}], precision="float32")
    try:
        assert post(server, body)[0] == 504
        until(lambda: health(server)[0] == 503)
        assert health(server)[1]["error"]["kind"] == "stuck"
        status, reply = post(server, body)
        assert (status, reply["error"]["kind"]) == (503, "stuck")
        assert "'stubborn' has not returned for 1.5 s" in reply["error"]["message"]
        images = torch.rand(2, 3, 8, 8)
        assert post(server, encode_request("brightness", images, ["x"] * 2, [{}] * 2))[0] == 200
    finally:
        gate.touch()
    until(lambda: health(server)[0] == 200)
    assert post(server, body)[1]["scores"] == [0.25]


def test_a_full_queue_is_refused_and_a_terminated_server_finishes_what_it_accepted(tmp_path):
    file, gate = tmp_path / "mine.py", tmp_path / "gate"
    file.write_text(MINE)
    process = subprocess.Popen(
        command(f"{file}:Held", "--port", "0", "--max-queue", "1"),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    url = json.loads(process.stdout.readline())["url"]
    body = encode_request("Held", torch.full((1, 3, 4, 4), 0.25), [str(gate)], [{}], precision="float32")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(post, url, body)
        until(gate.with_suffix(".entered").exists)
        status, reply = post(url, body)
        assert (status, reply["error"]["kind"]) == (503, "busy")
        process.terminate()
        until(lambda: not listens(url))
        gate.touch()
        status, reply = accepted.result(timeout=20)
    assert (status, reply["scores"]) == (200, [0.25])
    assert process.wait(timeout=20) == 0


def test_health_tells_strangers_nothing(server, served):
    assert set(served("size").function.describe().identity.versions) >= {"python", "torch", "numpy", "pillow"}
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"ready": True}
    connection.close()


def test_a_client_without_the_token_or_with_a_wrong_name_is_told(served, monkeypatch):
    with pytest.raises(ValueError, match="it serves jpeg_compressibility, brightness, diversity, size"):
        served("ocr")
    with pytest.raises(RewardError, match="token_env"):
        served("size", token_env="NOTHING_HERE")
    monkeypatch.setenv("DDPO_REWARD_TOKEN", "wrong-token-wrong-token")
    with pytest.raises(RewardError, match="401.*token_env"):
        served("size")


def test_a_batch_that_the_server_would_refuse_is_not_sent(served):
    with pytest.raises(RewardError, match=r"3\.\d MB, the server takes 2 MB; set the option batch_size"):
        served("brightness")(torch.rand(2, 3, 512, 512), ["x"] * 2, [{}] * 2)
    served("brightness", batch_size=1)(torch.rand(2, 3, 512, 512), ["x"] * 2, [{}] * 2)


# ------------------------------------------------------------------------------------------------- set-up


def test_a_reward_that_exits_is_an_error_and_the_server_goes_on(served):
    reward = served("leaves")
    for _ in range(2):  # nothing is stuck after the first
        with pytest.raises(RewardError, match=r"status 422: reward 'leaves' called exit\(0\)"):
            reward(torch.rand(1, 3, 4, 4), ["p"], [{}])


def test_connections_that_ask_for_nothing_are_closed_and_lock_nobody_out(server):
    host, port = server.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(300)]  # more than a server has room for
    try:
        for connection in silent[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        until(lambda: status(server) == 200)
        for connection in silent:
            connection.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    finally:
        for connection in silent:
            connection.close()
    assert health(server)[0] == 200


def test_a_connection_that_is_used_again_stays_open(server):
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=20)
    try:
        for pause in (0.0, 1.0, 1.0):  # together longer than a connection may be silent
            time.sleep(pause)
            connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
            assert connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_needs_a_token(host):
    with pytest.raises(ValueError, match="--token-file"):
        check_exposure(host, None)
    check_exposure(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert is_loopback(host)
    check_exposure(host, None)


def test_tokens_come_from_a_file_or_the_environment_and_must_be_long(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(f"{TOKEN}\n")
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    assert (read_token(file), read_token(None)) == (TOKEN, None)
    monkeypatch.setenv("DDPO_REWARD_TOKEN", TOKEN)
    assert read_token(None) == TOKEN
    file.write_text(f"{TOKEN}\na second line\n")
    with pytest.raises(ValueError, match="without spaces"):
        read_token(file)
    file.write_text("")
    for wrong in (file, tmp_path / "none"):
        with pytest.raises(ValueError, match="token"):
            read_token(wrong)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_that_others_may_read_is_refused(tmp_path, mode):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(mode)
    with pytest.raises(UserError, match=rf"others may read .*token \(mode {mode:o}\): chmod 600"):
        read_token(file)


def test_names_carry_options_as_json():
    assert split_options('a.py:b={"x": {"y": 1}}') == ("a.py:b", {"x": {"y": 1}})
    assert split_options("ocr") == ("ocr", {})
    with pytest.raises(ValueError, match="JSON object"):
        split_options("ocr={threads: 2}")


def test_a_label_stands_before_the_name():
    assert split_label('fast=ocr={"threads": 2}') == ("fast", 'ocr={"threads": 2}')
    assert split_label("bright=mine.py:Light") == ("bright", "mine.py:Light")
    for plain in ("ocr", 'ocr={"threads": 2}', "./a=b/mine.py:x", 'mine.py:x={"y": "a=b"}'):
        assert split_label(plain) == ("", plain)
    with pytest.raises(ValueError, match="label must not be one of"):
        split_label("mean=ocr")


def test_the_server_ends_with_its_parent(tmp_path):
    process = subprocess.Popen(
        command("brightness", "--port", "0", "--ends-with-parent"),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(timeout=60) == 0
