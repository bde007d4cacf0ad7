"""What happens when a reward server is attacked, lied to, killed or frozen: real processes, one table.

    python scripts/reward_faults.py                 all of it, about 5 minutes on 2 cores
    python scripts/reward_faults.py --only server   requests alone, no training

Each run is a short one on the embedded shapes pipeline whose reward is served by another process. Once its first epoch
is done the fault happens. Then a sound server takes the place of the faulty one, the run is resumed, and its final
weights are compared bit by bit with those of a run that computed the same reward itself, undisturbed.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from rewards.serving.wire import SAFETENSORS, encode_request

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "a-token-for-this-demonstration"
REWARD = "jpeg_compressibility"
RAISES = "def fussy(images, prompts, metadata):\n    raise RuntimeError('out of ink')\n"
CONFIG = """\
adapter: {rank: 2}
sampler: {num_steps: 4, guidance_scale: 1.0}
objective: {ratio: joint, updates_per_epoch: 2, step_fraction: 1.0}
batch: {samples_per_epoch: 16, group_size: 4, sample_batch_size: 8, train_batch_size: 32}
optimizer: {learning_rate: 1e-3}
prompts: {source: shapes}
evaluation: {num_prompts: 2, images_per_prompt: 2, every_epochs: 2, ode: false}
checkpoints: {every_epochs: 0}
tracking: {trackers: [], pictures_every_epochs: 0}
epochs: 4
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault and what followed."""

    fault: str
    followed: str
    passed: bool


def main() -> int:
    """Prints the table; status 1 when something did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("server", "runs"), help="one half of the table")
    parser.add_argument("--rogue", nargs=3, metavar=("PORT", "UPSTREAM", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rogue:
        serve_rogue(int(options.rogue[0]), options.rogue[1], options.rogue[2])
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [] if options.only == "runs" else [*requests(folder), public_bind()]
        rows += [] if options.only == "server" else runs(folder)
    for row in rows:
        print(f"{'ok    ' if row.passed else 'FAILED'}  {row.fault:<34}  {row.followed}")
    return 0 if all(row.passed for row in rows) else 1


# ---- requests --------------------------------------------------------------------------------------------------------


def requests(folder: Path) -> list[Row]:
    """Wrong requests to a live server, and a right one after them."""
    (folder / "fussy.py").write_text(RAISES)
    server, url = start_server(REWARD, f"{folder}/fussy.py:fussy", token=TOKEN)
    images = torch.rand(4, 3, 32, 32)
    sound = encode_request(REWARD, images, ["x"] * 4, [{}] * 4)
    short = encode_request(REWARD, images, ["x"] * 3, [{}] * 3)
    fussy = encode_request("fussy", images, ["x"] * 4, [{}] * 4)
    pickle = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R."
    cases = [
        ("wrong token", sound, SAFETENSORS, "not-the-token-of-this-server", 401),
        ("100 MB body", bytes(100_000_000), SAFETENSORS, TOKEN, 413),
        ("pickle body", pickle, "application/octet-stream", TOKEN, 415),
        ("pickle body called safetensors", pickle, SAFETENSORS, TOKEN, 400),
        ("3 prompts for 4 images", short, SAFETENSORS, TOKEN, 400),
        ("a reward that raises", fussy, SAFETENSORS, TOKEN, 422),
        ("a sound request after all these", sound, SAFETENSORS, TOKEN, 200),
    ]
    rows = []
    for fault, body, media, token, expected in cases:
        status, reply = post(url, body, media, token)
        text = reply["error"]["message"] if status != 200 else f"{len(reply['scores'])} scores"
        rows.append(Row(fault=fault, followed=f"{status}: {text[:110]}", passed=status == expected))
    server.terminate()
    status = server.wait(timeout=20)
    return [*rows, Row(fault="SIGTERM", followed=f"ended with status {status}", passed=status == 0)]


def public_bind() -> Row:
    """All interfaces, without a token."""
    command = ["rewards", "serve", REWARD, "--host", "0.0.0.0", "--port", "0"]
    done = run_ddpo(*command)
    return Row(
        fault="public bind without a token",
        followed=f"status {done.returncode}: {done.stderr.strip()[:110]}",
        passed=done.returncode == 2 and "token" in done.stderr,
    )


def post(url: str, body: bytes, media: str, token: str) -> tuple[int, dict]:
    """Status and JSON of one request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        headers = {"Content-Type": media, "Authorization": f"Bearer {token}"}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
            connection.request("POST", "/v1/score", body=body, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


# ---- runs ------------------------------------------------------------------------------------------------------------


def runs(folder: Path) -> list[Row]:
    """Faults in the middle of a run, and its resumption."""
    config = folder / "short.yaml"
    config.write_text(CONFIG + f"run: {{output_dir: {folder}}}\n")
    reference = folder / "undisturbed"
    done = run_ddpo("train", str(config), "--rewards", f"[{{name: {REWARD}}}]", "--run.name", reference.name)
    assert done.returncode == 0, done.stderr
    return [
        disturbed(config, reference, "kill -9", lambda server: server.send_signal(signal.SIGKILL)),
        disturbed(
            config, reference, "a server that hangs (SIGSTOP)", lambda server: server.send_signal(signal.SIGSTOP)
        ),
        disturbed(config, reference, "garbage in reply", None, mode="garbage"),
        disturbed(config, reference, "3 scores for 8 images", None, mode="count"),
        disturbed(config, reference, "NaN in reply", None, mode="nan"),
        disturbed(config, reference, "connection cut in the reply", None, mode="cut"),
    ]


def disturbed(
    config: Path, reference: Path, fault: str, strike: Callable[[subprocess.Popen], None] | None, *, mode: str = ""
) -> Row:
    """One run with a fault after its first epoch.

    Args:
        config: Of the run.
        reference: The undisturbed run.
        fault: Its name.
        strike: What is done to the server; None when the server misbehaves of itself.
        mode: How the server that stands between the run and a sound server misbehaves.
    """
    sound, sound_url = start_server(REWARD)
    server, url = (sound, sound_url) if strike else start_rogue(sound_url, mode)
    port = int(url.rpartition(":")[2])
    run = config.parent / fault.replace(" ", "-").replace("(", "").replace(")", "")
    options = f"url: '{url}', reward: {REWARD}, precision: float32, timeout: 3, max_wait: 4"
    terms = f"[{{name: remote, options: {{{options}}}}}]"
    training = start_ddpo("train", str(config), "--rewards", terms, "--run.name", run.name)
    if strike:
        wait_for_epoch(run, training)
        strike(server)
    _, errors = training.communicate(timeout=300)
    saved = sorted(path.name for path in (run / "checkpoints").glob("epoch_*"))
    for process in {server, sound}:
        process.kill()
        process.wait()
    replacement, _ = start_server(REWARD, port=port)
    resumed = run_ddpo("train", "--resume", str(run))
    replacement.kill()
    replacement.wait()
    same = resumed.returncode == 0 and final_weights(run) == final_weights(reference)
    message = next((line for line in errors.splitlines() if line.startswith("error: ")), "no message")
    followed = (
        f"status {training.returncode}, saved {', '.join(saved)}; {message[7:200]}; resumed: "
        f"{'weights equal the undisturbed' if same else f'status {resumed.returncode}, weights DIFFER'}"
    )
    stopped = training.returncode == 2 and message != "no message" and bool(saved)
    return Row(fault=fault, followed=followed, passed=stopped and same)


def wait_for_epoch(run: Path, training: subprocess.Popen) -> None:
    """Returns once the run has logged its first epoch."""
    metrics = run / "metrics.jsonl"
    while training.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.02)


def final_weights(run: Path) -> bytes:
    """The trained tensors of the last checkpoint, as a file."""
    return (run / "checkpoints" / "epoch_000004" / "weights.safetensors").read_bytes()


# ---- processes -------------------------------------------------------------------------------------------------------


def environment(token: str = "") -> dict[str, str]:
    """For processes of this checkout on the CPU."""
    plain = {key: value for key, value in os.environ.items() if key != "DDPO_REWARD_TOKEN"}
    settings = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
    return {**plain, **settings, **({"DDPO_REWARD_TOKEN": token} if token else {})}


def start_ddpo(*arguments: str, token: str = "") -> subprocess.Popen:
    """A `ddpo` command in the background."""
    command = [sys.executable, "-m", "trainers", *arguments]
    return subprocess.Popen(
        command, env=environment(token), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_ddpo(*arguments: str) -> subprocess.CompletedProcess:
    """A `ddpo` command to its end."""
    command = [sys.executable, "-m", "trainers", *arguments]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)


def start_server(*names: str, port: int = 0, token: str = "") -> tuple[subprocess.Popen, str]:
    """A reward server and its address."""
    server = start_ddpo("rewards", "serve", *names, "--port", str(port), token=token)
    return server, _address(server)


def start_rogue(upstream: str, mode: str) -> tuple[subprocess.Popen, str]:
    """A server that passes requests on to a sound one, until it misbehaves."""
    command: Sequence[str] = [sys.executable, __file__, "--rogue", "0", upstream, mode]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    return server, _address(server)


def _address(server: subprocess.Popen) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, f"the server ended with status {server.wait()}: {server.stderr and server.stderr.read()}"
    return json.loads(line)["url"]


def serve_rogue(port: int, upstream: str, mode: str) -> None:
    """Passes requests on; from the fifth batch on its replies are wrong in the way that `mode` says."""
    counts = {"batches": 0}
    host = upstream.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._pass_on(None)

        def do_POST(self) -> None:
            counts["batches"] += 1
            self._pass_on(self.rfile.read(int(self.headers["Content-Length"])))

        def _pass_on(self, body: bytes | None) -> None:
            connection = http.client.HTTPConnection(host)
            headers = {"Content-Type": self.headers["Content-Type"]} if body else {}
            connection.request(self.command, self.path, body=body, headers=headers)
            data = connection.getresponse().read()
            if counts["batches"] > 4:
                data = spoil(data, mode)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + (100 if mode == "cut" and counts["batches"] > 4 else 0)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
    server.serve_forever()


def spoil(data: bytes, mode: str) -> bytes:
    """A wrong reply made of a right one."""
    if mode == "garbage":
        return b"<html><body>502 Bad Gateway</body></html>"
    if mode == "cut":
        return data
    reply = json.loads(data)
    reply["scores"] = reply["scores"][:3] if mode == "count" else [float("nan"), *reply["scores"][1:]]
    return json.dumps(reply).encode()


if __name__ == "__main__":
    sys.exit(main())
