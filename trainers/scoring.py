"""Scores images in background threads while the next batch is sampled.

A reward that fails, or returns something that is not a finite score for every image, ends the run with an error that
names it; nothing is guessed in its place.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch
from torch import Tensor

from rewards import RewardError, Scores, WeightedSum
from trainers.processes import Processes


class Scorer:
    """A queue of batches to score, in order."""

    def __init__(self, reward: WeightedSum, *, threads: int = 1) -> None:
        """Starts the threads.

        Args:
            reward: What to score with.
            threads: Batches scored at the same time; more than 1 only for rewards that allow it.
        """
        self._reward = reward
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reward")
        self._pending: list[Future[Scores]] = []

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Queues one batch: images (B, 3, H, W) in [0, 1]."""
        self._pending.append(self._pool.submit(self._reward, images, prompts, metadata))

    def wait(self, *, seconds: float) -> bool:
        """Waits, not longer than so many seconds, and returns whether `collect` would return or raise at once."""
        state = wait(self._pending, timeout=seconds, return_when=FIRST_EXCEPTION)
        return not state.not_done or any(future.exception() is not None for future in state.done)

    def collect(self) -> Scores:
        """The scores of all queued batches, concatenated in order.

        Raises:
            RewardError: From the first batch that failed; the batches behind it are dropped.
        """
        pending, self._pending = self._pending, []
        try:
            parts = [future.result() for future in pending]
        except BaseException:
            for future in pending:
                future.cancel()
            raise
        names = parts[0].components
        return Scores(
            total=torch.cat([part.total for part in parts]),
            components={name: torch.cat([part.components[name] for part in parts]) for name in names},
        )

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def fail_together(processes: Processes, failure: RewardError | None) -> None:
    """Raises the reward failure of any process on all of them, so that none waits for one that is gone."""
    messages = [message for message in processes.gather_json(failure and str(failure)) if message is not None]
    if messages:
        raise failure or RewardError(str(messages[0]))
