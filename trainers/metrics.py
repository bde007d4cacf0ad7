"""Accumulators for what an epoch measures. They stay on the device: nothing here waits for the accelerator."""

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trainers.processes import Processes


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


class StepMeans:
    """Means per denoising step of values measured on transitions.

    T is the number of steps; each named value is summed per step together with its count.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self._count = torch.zeros(num_steps, dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}

    def add(self, steps: Tensor, values: Mapping[str, Tensor]) -> None:
        """Takes in N transitions: their steps (N,) int64 and values (N,) each, always under the same names."""
        steps = steps.to(self._count.device)
        self._count.index_add_(0, steps, torch.ones_like(steps, dtype=torch.float64))
        for name, value in values.items():
            total = self._sums.setdefault(name, torch.zeros_like(self._count))
            total.index_add_(0, steps, value.to(total))

    def reduce(self, processes: Processes) -> "dict[str, Tensor]":
        """Means over all processes, (T,) float64 on the CPU by name; NaN at steps never seen."""
        names = sorted(self._sums)
        table = processes.sum(torch.stack([self._count, *(self._sums[name] for name in names)])).cpu()
        return {name: total / table[0] for name, total in zip(names, table[1:], strict=True)}

    def seen(self, processes: Processes) -> Tensor:
        """Which steps any process took in, (T,) bool on the CPU."""
        return processes.sum(self._count).cpu() > 0

    def overall(self, means: Mapping[str, Tensor], processes: Processes) -> dict[str, float]:
        """Means over all transitions, from the per-step means that `reduce` returned; NaN if one at a step seen is."""
        count = processes.sum(self._count).cpu()
        return {name: float((value * count)[count > 0].sum() / count.sum()) for name, value in means.items()}


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the accelerator where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
