"""Accumulators for what an epoch measures. They stay on the device: nothing here waits for the accelerator."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.parallel.processes import Processes


class Stopwatch:
    """Seconds per phase, summed over repeated visits.

    Attributes:
        seconds: By phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a block. On a GPU this waits for its work at the end of the block."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class StepMean:
    """The mean of a value at each of T steps.

    Attributes:
        mean: (T,) float64 on the CPU; NaN at steps never seen.
        count: How many values each is of, (T,).
    """

    mean: Tensor
    count: Tensor

    @property
    def seen(self) -> Tensor:
        """Which steps any process took in, (T,) bool."""
        return self.count > 0

    @property
    def overall(self) -> float:
        """The mean over all values; NaN if that of a step seen is."""
        return float((self.mean * self.count)[self.seen].sum() / self.count.sum())


class StepMeans:
    """Means per denoising step of named values.

    T is the number of steps; each name's values are counted and summed per step.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self._shape, self._device = (2, num_steps), device
        self._tables: dict[str, Tensor] = {}

    def add(self, steps: Tensor, values: Mapping[str, Tensor]) -> None:
        """Takes in N rows: their steps (N,) int64 and values (N,) each."""
        steps = steps.to(self._device)
        for name, value in values.items():
            table = self._tables.setdefault(name, torch.zeros(self._shape, dtype=torch.float64, device=self._device))
            counts, sums = table
            counts.index_add_(0, steps, torch.ones_like(steps, dtype=torch.float64))
            sums.index_add_(0, steps, value.to(sums))

    def reduce(self, processes: Processes) -> dict[str, StepMean]:
        """Means over all processes, which took in values of the same names."""
        if not self._tables:
            return {}
        names = sorted(self._tables)
        tables = processes.sum(torch.stack([self._tables[name] for name in names])).cpu()
        return {
            name: StepMean(mean=sums / counts, count=counts) for name, (counts, sums) in zip(names, tables, strict=True)
        }


class Means:
    """What the losses of some micro-batches measured."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self._of_steps = StepMeans(num_steps, device)
        self._of_none = StepMeans(1, device)

    def add(self, values: Mapping[str, Tensor], steps: Tensor | None) -> None:
        """Takes in values (N,) each, and at which steps they were measured, (N,) int64; None for at none."""
        for name, value in values.items() if steps is None else ():
            self._of_none.add(torch.zeros(len(value), dtype=torch.int64), {name: value})
        if steps is not None:
            self._of_steps.add(steps, values)

    def reduce(self, processes: Processes) -> tuple[dict[str, StepMean], dict[str, float]]:
        """Means over all processes: per step, of what was measured at steps; and overall, of everything."""
        per_step = self._of_steps.reduce(processes)
        others = self._of_none.reduce(processes)
        return per_step, {name: mean.overall for name, mean in (per_step | others).items()}


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
