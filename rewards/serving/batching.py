"""Joins requests that arrive together into one call of a reward, and gives each its own scores back.

One thread per reward calls it. While it scores, requests queue up; the next call takes as many as fit: images of one
size, up to `max_batch` of them. A request is never split, since a reward may compare the images of one call. When a
joined call fails, its requests are scored one by one, so that only those at fault get the error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata, RewardError, Scores
from rewards.reward import Reward, describe_exception


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request in the queue; see `rewards.serving.wire.ScoreRequest`."""

    images: Tensor
    prompts: list[str]
    metadata: list[Metadata]
    future: Future[Scores] = field(default_factory=Future)


@final
class Batcher:
    """A reward behind a queue.

    Args:
        reward: What to call.
        max_batch: Images up to which requests are joined; 1 joins none.
        max_delay: Seconds that the first request waits for others.
    """

    def __init__(self, reward: Reward, *, max_batch: int, max_delay: float) -> None:
        self.reward = reward
        self._max_batch = max_batch
        self._max_delay = max_delay
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._started: float | None = None
        self.calls = 0
        # A daemon: a reward that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"reward {reward.name}", daemon=True)
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        """How long the present call has been running; 0 between calls."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def submit(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Future[Scores]:
        """Queues a request; cancel the future to take it out again before it is scored, and free its images."""
        job = Job(images=images, prompts=prompts, metadata=metadata)
        job.future.add_done_callback(self._forget_cancelled)
        with self._changed:
            if self._closed:
                raise RuntimeError("the server is shutting down")
            self._queue.append(job)
            self._changed.notify()
        return job.future

    def _forget_cancelled(self, future: Future[Scores]) -> None:
        if future.cancelled():
            with self._changed:
                self._queue = deque(job for job in self._queue if job.future is not future)

    def close(self, *, patience: float) -> bool:
        """Takes no more requests, and waits up to `patience` seconds for those queued; whether all were scored."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while jobs := self._next():
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._started = time.monotonic()
                self._score(running)
                self._started = None

    def _next(self) -> list[Job]:
        """The jobs of the next call; empty once closed and drained."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return []
                deadline = time.monotonic() + self._max_delay
                while not self._is_full() and not self._closed and (left := deadline - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._queue:  # else all were given up while this one waited for more
                    return self._take()

    def _is_full(self) -> bool:
        return sum(len(job.prompts) for job in self._queue) >= self._max_batch

    def _take(self) -> list[Job]:
        taken, size = [self._queue.popleft()], len(self._queue)
        count = len(taken[0].prompts)
        for _ in range(size):
            job = self._queue.popleft()
            fits = job.images.shape[1:] == taken[0].images.shape[1:] and count + len(job.prompts) <= self._max_batch
            if fits:
                taken.append(job)
                count += len(job.prompts)
            else:
                self._queue.append(job)  # once around: the order of the others stays
        return taken

    def _score(self, jobs: list[Job]) -> None:
        self.calls += 1
        try:
            scores = self.reward(
                torch.cat([job.images for job in jobs]),
                [prompt for job in jobs for prompt in job.prompts],
                [entry for job in jobs for entry in job.metadata],
            )
        except BaseException as error:  # whatever it is, somebody waits for an answer, and others for this thread
            if len(jobs) == 1:
                jobs[0].future.set_exception(_answerable(error, self.reward.name))
                return
            for job in jobs:
                self._score([job])
            return
        start = 0
        for job in jobs:
            rows = slice(start, start + len(job.prompts))
            start = rows.stop
            parts = {name: values[rows] for name, values in scores.components.items()}
            job.future.set_result(Scores(total=scores.total[rows], components=parts))


def _answerable(error: BaseException, reward: str) -> Exception:
    """An error that can be handed to a waiting request: what ends a process would end the server's loop there."""
    if isinstance(error, Exception):
        return error
    return RewardError(f"reward {reward!r} {describe_exception(error)}")
