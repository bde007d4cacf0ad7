"""Concurrent requests share a call of the reward, and each gets exactly its own scores."""

import threading
import weakref
from concurrent.futures import wait

import pytest
import torch

from rewards import RewardError, as_reward
from rewards.serving.batching import Batcher

SECONDS = 10


class Gate:
    """A reward that scores the mean level, notes the size of each call, and waits before the first one returns."""

    def __init__(self):
        self.sizes = []
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, images, prompts, metadata):
        self.sizes.append(len(prompts))
        self.entered.set()
        self.open.wait(SECONDS)
        if "bad" in prompts:
            raise ValueError("a bad prompt")
        return {"score": images.mean(dim=(1, 2, 3)), "length": torch.tensor([float(len(p)) for p in prompts])}


@pytest.fixture
def gate():
    return Gate()


def start(gate, max_batch=64):
    """A batcher whose thread is inside a first call, so that what follows queues up."""
    batcher = Batcher(as_reward(gate, name="gate"), max_batch=max_batch, max_delay=0.0)
    batcher.submit(torch.zeros(1, 3, 2, 2), ["first"], [{}])
    assert gate.entered.wait(SECONDS)
    return batcher


def test_requests_that_wait_are_joined_and_split_again(gate):
    batcher = start(gate)
    batches = [torch.rand(n, 3, 4, 4) for n in (1, 3, 2)]
    futures = [batcher.submit(batch, ["p" * len(batch)] * len(batch), [{}] * len(batch)) for batch in batches]
    gate.open.set()
    wait(futures, SECONDS)
    assert gate.sizes == [1, 6]
    for future, batch in zip(futures, batches, strict=True):
        assert torch.equal(future.result().total, batch.mean(dim=(1, 2, 3)))
        assert future.result().components["length"].tolist() == [float(len(batch))] * len(batch)
    assert batcher.close(patience=SECONDS)


def test_sizes_are_not_mixed_batches_not_exceeded_and_requests_not_split(gate):
    batcher = start(gate, max_batch=4)
    shapes = [(3, 4), (2, 4), (1, 4), (1, 8), (6, 8)]
    futures = [batcher.submit(torch.rand(n, 3, s, s), ["p"] * n, [{}] * n) for n, s in shapes]
    gate.open.set()
    assert [len(future.result(SECONDS).total) for future in futures] == [n for n, _ in shapes]
    assert gate.sizes == [1, 4, 2, 1, 6]
    assert batcher.close(patience=SECONDS)


def test_only_the_request_at_fault_fails(gate):
    batcher = start(gate)
    images = torch.rand(1, 3, 4, 4)
    futures = [batcher.submit(images, [prompt], [{}]) for prompt in ("good", "bad", "fine")]
    gate.open.set()
    assert torch.equal(futures[0].result(SECONDS).total, futures[2].result(SECONDS).total)
    with pytest.raises(RewardError, match="a bad prompt"):
        futures[1].result(SECONDS)
    assert batcher.close(patience=SECONDS)


def test_a_request_that_was_given_up_is_not_scored(gate):
    batcher = start(gate)
    given_up, kept = (batcher.submit(torch.rand(n, 3, 4, 4), ["p"] * n, [{}] * n) for n in (5, 2))
    assert given_up.cancel()
    gate.open.set()
    assert len(kept.result(SECONDS).total) == 2
    assert gate.sizes == [1, 2]
    assert batcher.close(patience=SECONDS)


def test_images_of_requests_that_were_given_up_are_freed_while_a_call_hangs(gate):
    batcher = start(gate)
    held = []
    for _ in range(3):
        images = torch.rand(5, 3, 4, 4)
        held.append(weakref.ref(images))
        future = batcher.submit(images, ["p"] * 5, [{}] * 5)
        del images
        assert held[-1]() is not None, "it waits in the queue"
        assert future.cancel()
    assert [ref() for ref in held] == [None] * 3
    kept = batcher.submit(torch.rand(2, 3, 4, 4), ["p"] * 2, [{}] * 2)
    gate.open.set()
    assert len(kept.result(SECONDS).total) == 2
    assert gate.sizes == [1, 2]
    assert batcher.close(patience=SECONDS)


def test_a_request_that_is_given_up_while_others_are_waited_for_leaves_the_thread_alive(gate):
    gate.open.set()
    batcher = Batcher(as_reward(gate, name="gate"), max_batch=64, max_delay=0.05)
    assert batcher.submit(torch.rand(1, 3, 2, 2), ["p"], [{}]).cancel()
    for _ in range(2):
        assert len(batcher.submit(torch.rand(1, 3, 2, 2), ["p"], [{}]).result(SECONDS).total) == 1
    assert batcher.close(patience=SECONDS)


def test_what_is_queued_at_the_end_is_still_scored_and_a_hanging_reward_is_reported(gate):
    batcher = start(gate)
    queued = batcher.submit(torch.rand(1, 3, 2, 2), ["p"], [{}])
    assert not batcher.close(patience=0.01)
    assert batcher.busy_seconds > 0
    with pytest.raises(RuntimeError, match="shutting down"):
        batcher.submit(torch.rand(1, 3, 2, 2), ["p"], [{}])
    gate.open.set()
    assert len(queued.result(SECONDS).total) == 1
    assert batcher.close(patience=SECONDS)


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_reward_that_wants_to_end_the_process_fails_its_request_and_the_next_is_scored(end):
    def moody(images, prompts, metadata):
        if prompts == ["bad"]:
            raise end
        return images.mean(dim=(1, 2, 3))

    batcher = Batcher(as_reward(moody), max_batch=1, max_delay=0.0)
    failed = batcher.submit(torch.zeros(1, 3, 2, 2), ["bad"], [{}])
    with pytest.raises(RewardError, match="reward 'moody' "):
        failed.result(SECONDS)
    assert batcher.submit(torch.ones(1, 3, 2, 2), ["good"], [{}]).result(SECONDS).total.tolist() == [1.0]
    assert batcher.close(patience=SECONDS)
