"""What makes a GPU wait for Python: reading a tensor's value, or a shape that depends on values.

CPU tensors stand in for a GPU's: every such read of an epoch is counted with the function of ours it happens in. None
may happen once a step or once a micro-batch, which is what grows with the number of steps, but for tensors that are on
the CPU anyway.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_epoch import epochs
from ddpo import Policy
from trainers.config.io import load_config

ROOT = Path(__file__).parents[3]
OURS = tuple(f"{ROOT / package}/" for package in ("ddpo", "rewards", "trainers"))
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
METHODS = {"tolist", "cpu", "numpy"}  # on the CPU they call no operation
ON_THE_CPU = {
    "ddpo/rollout.py:_Record.add": "where a KL is measured",
    "ddpo/trajectory.py:Sites.within": "where a KL is measured",
    "ddpo/objectives/noised_samples.py:drawn": "which noises and steps are trained",
    "ddpo/objectives/noising.py:draw_noises": "which noises and steps are trained",
    "ddpo/objectives/pathwise.py:_common": "which steps",
    "ddpo/path_kl.py:path_kl_estimate": "the KLs of an epoch, brought there at once",
    "ddpo/seeds.py:fill_normal": "noise is drawn there",
    "ddpo/seeds.py:fill_noise": "noise is drawn there",
}
OBJECTIVES = {
    "policy gradient": [],
    "policy gradient with a KL": ["--kl.alpha", "0.01"],
    "clean samples": ["--objective.kind", "clean_sample", "--objective.preset", "nft"],
    "through the reward": ["--objective.kind", "reward_gradient"],
}


class Reads(TorchDispatchMode):
    """Counts reads by function while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(_is_mask(index) for index in args[1])
        if masks or name in OPERATIONS:
            self.counts[_where()] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Counts the reads that call no operation."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            self._reads.counts[_where()] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _where() -> str:
    """The innermost function of ours, by file and name."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    name = frame.f_code.co_qualname.split(".<locals>")[0]
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{name}"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    reads = Reads()
    with Methods(reads), reads:
        yield reads.counts


@pytest.fixture(scope="module")
def reads_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Counter[str]]:
    """Reads of the second epoch, by function."""
    folder = tmp_path_factory.mktemp("reads")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "run.yaml").write_text(
        f"model: {{path: shapes, device: cpu}}\nrewards: [{{name: brightness}}]\n"
        f"prompts: {{source: {folder / 'prompts.txt'}}}\n"
        "batch: {samples_per_epoch: 4, group_size: 2, sample_batch_size: 4, train_batch_size: 4}\n"
    )

    def read(num_steps: int, *options: str) -> Counter[str]:
        run = epochs(load_config(folder / "run.yaml", ["--sampler.num_steps", str(num_steps), *options]))
        next(run)
        with counted() as counts:
            next(run)
        return counts

    return read


def growing(few: Counter[str], many: Counter[str]) -> dict[str, int]:
    return {name: count - few[name] for name, count in many.items() if count > few[name] and name not in ON_THE_CPU}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_more_steps_read_no_more_values(reads_of: Callable[..., Counter[str]], name: str) -> None:
    few, many = (reads_of(num_steps, *OBJECTIVES[name]) for num_steps in (3, 6))
    assert growing(few, many) == {}


def test_a_planted_read_is_found(reads_of: Callable[..., Counter[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Policy.__call__

    def reading(self: Policy, k: int, x: Tensor, *rest: object, **named: object) -> object:
        assert x.sum().item() != 0
        return plain(self, k, x, *rest, **named)

    few = reads_of(3)
    monkeypatch.setattr(Policy, "__call__", reading)
    assert growing(few, reads_of(6)), "an .item() at every network call went unnoticed"
