"""Images a second of a reward server against the same reward in this process.

    python benchmarks/reward_server.py [--rewards jpeg_compressibility,imagenet_class] [--device cpu] [--size 256]

Each reward is timed four ways, interleaved, medians over the rounds: called here; over loopback, batch after batch from
one client; from four clients at once, whose batches the server may join; and with a batch cut into single-image
requests sent eight at a time. Images are on 8-bit levels, so they travel as bytes and the scores are the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rewards import Reward, resolve

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a photo of a tiger cat"
CLIENTS = 4


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", default="jpeg_compressibility,imagenet_class", help="names, separated by commas")
    parser.add_argument("--device", default="cpu", help="for rewards with weights, on both sides")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=16, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each way")
    options = parser.parse_args()
    names = options.rewards.split(",")
    server, url = start(names, options.device)
    try:
        print(f"{options.batch} images of {options.size} x {options.size} in a batch; images/s, medians")
        columns = ("in process", "1 client", f"{CLIENTS} clients", "singly, 8", "ms a batch")
        print(f"{'reward':<24}" + "".join(f"{column:>12}" for column in columns))
        for name in names:
            rates = measure(name, url, options)
            overhead = 1000 * options.batch * (1 / rates[1] - 1 / rates[0])
            print(f"{name:<24}" + "".join(f"{rate:>12.1f}" for rate in rates) + f"{overhead:>+12.1f}")
    finally:
        server.terminate()
        server.wait()


def measure(name: str, url: str, options: argparse.Namespace) -> list[float]:
    """Images a second of each way."""
    images = torch.randint(0, 256, (options.batch, 3, options.size, options.size)).float() / 255
    here = resolve(name, device=options.device)
    there = remote(url, name)
    singly = remote(url, name, batch_size=1, concurrency=8)

    def score(reward: Reward) -> None:
        reward(images, [PROMPT] * options.batch, [{}] * options.batch)

    def together() -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(score, [there] * CLIENTS))

    ways: list[tuple[Callable[[], None], int]] = [
        (lambda: score(here), 1), (lambda: score(there), 1), (together, CLIENTS), (lambda: score(singly), 1)
    ]  # fmt: skip
    seconds: list[list[float]] = [[] for _ in ways]
    for round_number in range(options.rounds + 1):
        for (way, batches), found in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            if round_number:  # the first warms up
                found.append((time.perf_counter() - began) / batches)
    return [options.batch / statistics.median(found) for found in seconds]


def remote(url: str, name: str, **extra: object) -> Reward:
    """The served reward."""
    return resolve("remote", options={"url": url, "reward": name, **extra})


def start(names: list[str], device: str) -> tuple[subprocess.Popen, str]:
    """A server of the rewards, and its address."""
    command = [sys.executable, "-m", "trainers", "rewards", "serve", *names, "--port", "0", "--device", device]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, json.loads(server.stdout.readline())["url"]


if __name__ == "__main__":
    main()
