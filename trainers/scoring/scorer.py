"""Scores images in background threads while the next batch is sampled.

A reward that fails, or returns something that is not a finite score for every image, ends the run with an error that
names it; nothing is guessed in its place.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from torch import Tensor

from rewards import RewardError, WeightedSum
from rewards.base import join_components, renumber_sample
from trainers.parallel.agreement import ToldElsewhere
from trainers.parallel.processes import Processes
from trainers.scoring.whole_groups import GroupBuffer, ImageBatch


@contextmanager
def scoring_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which rewards run, for the time of a `with` block; what has not begun at its end never does.

    Args:
        count: Batches scored at the same time; more than 1 only for rewards that allow it.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="reward")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Scorer:
    """Scores batches of images in the background, in order."""

    def __init__(
        self, reward: WeightedSum, threads: ThreadPoolExecutor, *, group_size: int = 1, first: int = 0
    ) -> None:
        """Takes any number of batches.

        Args:
            reward: What to score with.
            threads: Where it runs.
            group_size: Images of a prompt, next to each other; used where the reward compares them.
            first: Number of the first image among those of all processes, for errors.
        """
        self._reward = reward
        self._threads = threads
        self._first = first
        self._buffer = GroupBuffer(group_size if reward.groupwise else 1)
        self._pending: list[Future[dict[str, Tensor]]] = []

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Takes one batch: images (B, 3, H, W) in [0, 1]."""
        for batch in self._buffer.add(images, prompts, metadata):
            self._pending.append(self._threads.submit(self._score, batch))

    def _score(self, batch: ImageBatch) -> dict[str, Tensor]:
        with named_by_number(self._first + batch.start, len(batch.prompts)):
            return self._reward.components(batch.images, batch.prompts, batch.metadata, batch.groups)

    def wait(self, *, seconds: float) -> bool:
        """Waits, not longer than so many seconds, and returns whether `collect` would return or raise at once."""
        state = wait(self._pending, timeout=seconds, return_when=FIRST_EXCEPTION)
        return not state.not_done or any(future.exception() is not None for future in state.done)

    def collect(self) -> dict[str, Tensor]:
        """The raw components of all batches, concatenated in order.

        Raises:
            RewardError: From the first batch that failed; the batches behind it are dropped. Or batches have
                different components.
        """
        try:
            parts = [future.result() for future in self._pending]
        except BaseException:
            for future in self._pending:
                future.cancel()
            raise
        return join_components(parts)


@contextmanager
def named_by_number(first: int, count: int) -> Iterator[None]:
    """Makes the failure of a reward name the sample by its number in the epoch or evaluation, over all processes.

    Args:
        first: Number of the first sample that is scored.
        count: How many are.
    """
    try:
        yield
    except RewardError as error:
        renumber_sample(error, range(first, first + count))
        raise


class RewardFailedElsewhere(RewardError, ToldElsewhere):
    """A reward failed in another process, which tells of it."""


def fail_together(processes: Processes, failure: RewardError | None) -> None:
    """Raises the reward failure of any process on all of them, so that none waits for one that is gone.

    The first process that has one tells of it.
    """
    messages = processes.gather_json(failure and str(failure))
    ranks = [rank for rank, message in enumerate(messages) if message is not None]
    if ranks and failure is not None and ranks[0] == processes.rank:
        raise failure
    if ranks:
        raise RewardFailedElsewhere(str(messages[ranks[0]]))
