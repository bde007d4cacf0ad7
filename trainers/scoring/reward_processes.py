"""Rewards in processes of their own: one reward server for each configured device, on every machine of a run.

The first training process of a machine starts them; all of its training processes send their batches to whichever is
free, images as float32 over the loopback interface, so that scores are those of the training process itself. Requests
are not joined. They end with the process that started them, however it ends.
"""

import json
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rewards import Reward, RewardError, RewardTerm, WeightedSum
from rewards.description import DescribedReward, Description, described
from rewards.serving.client import Client, Patience
from rewards.serving.remote import ServedReward
from rewards.serving.wire import TOKEN_VARIABLE
from trainers.config import Config
from trainers.config.groups import RewardProcessConfig
from trainers.parallel.launcher import local_rank
from trainers.parallel.processes import Processes

_MAX_BODY_MB = 4096
_RECONNECT_SECONDS = 10.0
_ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_rewards(config: Config, processes: Processes) -> tuple[WeightedSum, WeightedSum | None]:
    """The rewards of a configuration, and the held-out ones, computed in processes of their own.

    Args:
        config: With `reward_processes.devices`.
        processes: Who shares the run; all of them call this together.

    Raises:
        RewardError: A process could not be started; raised on all.
    """
    servers = _start_on_each_machine(config, processes)
    optimised, heldout = (
        WeightedSum(terms, rewards=[servers.reward(_spec(term)) for term in terms]) if terms else None
        for terms in (config.terms, config.heldout_rewards)
    )
    assert optimised is not None, "a configuration has at least one reward"
    return optimised, heldout


class RewardServers:
    """The reward processes of this machine, as one of its training processes sees them.

    Args:
        urls: Addresses, one for each.
        names: The name that each reward is served under, by what a term asks for (`_spec`).
        token: What they expect.
        timeout: Seconds for one batch.
        children: The processes, where they were started; they end when this object is gone.
    """

    def __init__(
        self,
        urls: Sequence[str],
        names: Mapping[str, str],
        *,
        token: str,
        timeout: float,
        children: Sequence[subprocess.Popen[bytes]] = (),
    ) -> None:
        self._urls = tuple(urls)
        self._names = dict(names)
        self._token = token
        self._timeout = timeout
        self._busy = [0] * len(urls)
        self._lock = threading.Lock()
        self.children = tuple(children)
        self.close = weakref.finalize(self, end, self.children)

    def reward(self, spec: str) -> Reward:
        """The reward of a term."""
        name = self._names[spec]
        patience = Patience(timeout=self._timeout, max_wait=_RECONNECT_SECONDS)
        clients = [Client(url, token=self._token, patience=patience, label=f"reward {name!r}") for url in self._urls]
        served = [ServedReward(client, name, precision="float32") for client in clients]
        return described(Reward(name=name, function=_Dispatch(self, served)))

    def acquire(self) -> int:
        """The process with the least to do, which then has one more."""
        with self._lock:
            index = self._busy.index(min(self._busy))
            self._busy[index] += 1
            return index

    def release(self, index: int) -> None:
        """The work taken by `acquire` is done."""
        with self._lock:
            self._busy[index] -= 1


class _Dispatch(DescribedReward):
    """A reward function that sends every batch to a free process."""

    def __init__(self, servers: RewardServers, served: Sequence[ServedReward]) -> None:
        self._servers = servers
        self._served = tuple(served)

    def describe(self) -> Description:
        """Name, range, identity and all else of what the processes serve."""
        about = self._served[0].about
        return Description(
            groupwise=about.groupwise,
            range=about.range,
            description=about.description,
            source="in a process of its own",
            identity=replace(about.identity, where="reward processes"),
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> dict[str, Tensor]:
        index = self._servers.acquire()
        try:
            return self._served[index](images, prompts, metadata)
        finally:
            self._servers.release(index)


# ---- starting and ending ---------------------------------------------------------------------------------------------


def _start_on_each_machine(config: Config, processes: Processes) -> RewardServers:
    """Starts the processes on the first training process of each machine and tells the others where they are."""
    options = config.reward_processes
    specs = list(dict.fromkeys(_spec(term) for term in (*config.terms, *config.heldout_rewards)))
    own: dict[str, object] | None = None
    children: list[subprocess.Popen[bytes]] = []
    failure = ""
    if local_rank() == 0:
        token = secrets.token_urlsafe(32)
        try:
            urls, names, children = launch(specs, options, token=token)
            own = {"urls": urls, "names": names, "token": token}
        except RewardError as error:
            failure = str(error)
    failures = [text for text in processes.gather_json(failure) if text]
    if failures:
        end(children)
        raise RewardError(str(failures[0]))
    mine = processes.gather_json(own)[processes.rank - local_rank()]
    assert isinstance(mine, dict)
    return RewardServers(mine["urls"], mine["names"], token=mine["token"], timeout=options.timeout, children=children)


def launch(
    specs: Sequence[str], options: RewardProcessConfig, *, token: str
) -> tuple[list[str], dict[str, str], list[subprocess.Popen[bytes]]]:
    """Starts one reward server for each device and waits until all are ready.

    Args:
        specs: Rewards as `ddpo rewards serve` takes them.
        options: Devices and time limits.
        token: What clients will present.

    Returns:
        Addresses, the served name of each of `specs`, and the processes.

    Raises:
        RewardError: One did not become ready; all are ended.
    """
    arguments = ["--port", "0", "--max-batch", "1", "--timeout", str(options.timeout), "--ends-with-parent"]
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    environment |= {TOKEN_VARIABLE: token, "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path[1:]])}
    children = []
    for device in options.devices:
        command = [sys.executable, "-m", "trainers", "rewards", "serve", *specs, *arguments, "--device", device]
        command += ["--max-body-mb", str(_MAX_BODY_MB)]
        # In a session of its own: Ctrl-C is for the training process, which ends this one when it is done with it.
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        children.append(child)
    deadline = time.monotonic() + options.start_timeout
    try:
        announced = [
            _announcement(child, device, deadline) for child, device in zip(children, options.devices, strict=True)
        ]
    except BaseException:
        end(children)
        raise
    served = announced[0]["rewards"]
    assert isinstance(served, list)
    return [str(entry["url"]) for entry in announced], dict(zip(specs, served, strict=True)), children


def _announcement(child: subprocess.Popen[bytes], device: str, deadline: float) -> dict[str, object]:
    """The line that a server prints once it is ready; what else it prints goes to stderr."""
    lines: queue.Queue[dict[str, object] | None] = queue.Queue()
    threading.Thread(target=_follow, args=(child, lines), daemon=True).start()
    try:
        found = lines.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty as error:
        raise RewardError(
            f"the reward process on {device} was not ready in time; raise reward_processes.start_timeout"
        ) from error
    if found is None:
        raise RewardError(
            f"the reward process on {device} ended with status {child.wait()} before it was ready; its message is above"
        )
    return found


def _follow(child: subprocess.Popen[bytes], lines: "queue.Queue[dict[str, object] | None]") -> None:
    assert child.stdout is not None
    for line in child.stdout:
        text = line.decode(errors="replace")
        if text.startswith('{"url"'):
            lines.put(json.loads(text))
        else:
            sys.stderr.write(text)
    lines.put(None)


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends reward processes: asked first, killed when they do not listen."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdin is not None:
            child.stdin.close()


def _spec(term: RewardTerm) -> str:
    """A term as `ddpo rewards serve` takes it."""
    plain = f"{term.name}={json.dumps(term.options)}" if term.options else term.name
    return f"{term.label}={plain}" if term.label else plain
