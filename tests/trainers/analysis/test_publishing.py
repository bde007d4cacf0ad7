"""`ddpo export --push` against a stand-in of the hub's HTTP interface: what arrives there, what is refused."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import close_session, constants
from safetensors.torch import load

from ddpo.validation import UserError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import start, write_config
from trainers.analysis.publishing import check_push
from trainers.cli import main


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits; every file is a regular one, inline in its commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, status=401)
        if self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            return self.answer({"url": f"{server.address}/me/lora"})
        if self.path.endswith("/api/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        assert self.path == "/api/models/me/lora/commit/main", self.path
        lines = [json.loads(line) for line in body.splitlines()]
        server.files = {line["value"]["path"]: base64.b64decode(line["value"]["content"])
                        for line in lines if line["key"] == "file"}  # fmt: skip
        server.commits += 1
        return self.answer({"commitUrl": f"{server.address}/me/lora/commit/1", "commitOid": "1", "hookOutput": ""})

    def answer(self, value, *, status=200):
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.files, server.commits = [], {}, 0
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    return start(write_config(folder, folder / "model"), "--epochs", "1")


@pytest.fixture
def online(hub, monkeypatch):
    """The stand-in as the hub, and a token that it takes."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    close_session()  # one that was made while the hub was switched off refuses every request
    yield
    close_session()


def export(run, *arguments):
    return main(["export", str(run), *map(str, arguments)])


def test_weights_card_and_picture_arrive_in_one_commit(run, hub, online, tmp_path, capsys):
    wanted = ("--format", "diffusers", "--push", "me/lora", "--private", "--output", tmp_path / "out")
    assert export(run, *wanted) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.address}/me/lora"
    assert (hub.commits, hub.made[0]["visibility"]) == (1, "private")
    assert set(hub.files) == {"pytorch_lora_weights.safetensors", "README.md", "before_after.png"}
    sent = load(hub.files["pytorch_lora_weights.safetensors"])
    kept = load((run / "lora" / "pytorch_lora_weights.safetensors").read_bytes())
    assert sent.keys() == kept.keys() and all(bool((sent[name] == kept[name]).all()) for name in kept)
    card = hub.files["README.md"].decode()
    assert 'pipe.load_lora_weights("me/lora")' in card and "FOLDER" not in card.replace("FOLDER is", "")
    assert "## Pretrained and fine-tuned" in card


def test_a_hub_that_refuses_is_told_in_a_line_and_the_weights_are_kept(run, hub, online, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    file = tmp_path / "a.safetensors"
    assert export(run, "--format", "kohya", "--push", "me/lora", "--output", file) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --push me/lora: ") and told.endswith(f"the weights are in {file}")
    assert file.is_file() and hub.commits == 0


def test_what_cannot_be_uploaded_is_refused_before_anything_is_loaded(monkeypatch):
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_push("me/lora")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("trainers.analysis.publishing.get_token", lambda: None)
    with pytest.raises(UserError, match="nobody is logged in"):
        check_push("me/lora")
    with pytest.raises(UserError, match="must be OWNER/NAME, got 'lora'"):
        check_push("lora")
    with pytest.raises(UserError, match=r"--push me/lo ra: "):
        check_push("me/lo ra")
