"""Scores images in background threads while the next batch is sampled.

A reward that fails, or returns something that is not a finite score for every image, ends the run with an error that
names it; nothing is guessed in its place.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType

from torch import Tensor

from rewards import RewardError, Scores, WeightedSum
from rewards.base import concatenate
from trainers.grouping import GroupBuffer, ImageBatch
from trainers.processes import Processes


class Scorer:
    """Queues of batches to score, each in order."""

    def __init__(self, reward: WeightedSum, *, threads: int = 1, group_size: int = 1) -> None:
        """Starts the threads.

        Args:
            reward: What to score with.
            threads: Batches scored at the same time; more than 1 only for rewards that allow it.
            group_size: Images of a prompt, next to each other; used where the reward compares them.
        """
        self._reward = reward
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reward")
        self._group_size = group_size if reward.groupwise else 1
        self._buffers: dict[int, GroupBuffer] = {}
        self._pending: dict[int, list[Future[Scores]]] = {}

    def submit(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]], *, queue: int = -1
    ) -> None:
        """Queues one batch: images (B, 3, H, W) in [0, 1]. Each `queue` is collected by itself."""
        buffer = self._buffers.setdefault(queue, GroupBuffer(self._group_size))
        for batch in buffer.add(images, prompts, metadata):
            self._pending.setdefault(queue, []).append(self._pool.submit(self._score, batch))

    def _score(self, batch: ImageBatch) -> Scores:
        return self._reward(batch.images, batch.prompts, batch.metadata, batch.groups)

    def wait(self, *, seconds: float, queue: int = -1) -> bool:
        """Waits, not longer than so many seconds, and returns whether `collect` would return or raise at once."""
        state = wait(self._pending[queue], timeout=seconds, return_when=FIRST_EXCEPTION)
        return not state.not_done or any(future.exception() is not None for future in state.done)

    def collect(self, queue: int = -1) -> Scores:
        """The scores of all batches of a queue, concatenated in order.

        Raises:
            RewardError: From the first batch that failed; the batches behind it are dropped. Or batches have
                different components.
        """
        pending = self._pending.pop(queue)
        try:
            parts = [future.result() for future in pending]
        except BaseException:
            for future in pending:
                future.cancel()
            raise
        return concatenate(parts)

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
