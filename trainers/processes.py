"""The processes that share a run, through accelerate.

Everything a rank decides alone is derived from global numbers (sample index, epoch, seed), so that results do not
depend on the number of processes beyond rounding.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn


class Processes:
    """This process's place among all, and the few collectives that training needs.

    Attributes:
        rank: Index of this process.
        count: Number of processes.
        device: Where this process computes.
    """

    def __init__(self, *, device: str | None = None) -> None:
        """Joins the processes that torchrun or accelerate launched, or stands alone.

        Args:
            device: `cpu` to stay off the accelerator; None takes this process's own.
        """
        self._accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.device = self._accelerator.device if device is None or self.count > 1 else torch.device(device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's contiguous part of `total` items."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over all processes in the backward pass."""
        return network if self.count == 1 else self._accelerator.prepare_model(network)

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in rank order; every process passes the same number of rows."""
        return values if self.count == 1 else self._accelerator.gather(values.to(self.device)).to(values.device)

    def gather_objects(self, value: object) -> list[object]:
        """One value of each process, in rank order, on every process."""
        if self.count == 1:
            return [value]
        everything: list[object] = [None] * self.count
        dist.all_gather_object(everything, value)
        return everything

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, elementwise."""
        return values if self.count == 1 else self._accelerator.reduce(values.to(self.device), "sum")

    def wait(self) -> None:
        """Returns once every process is here."""
        self._accelerator.wait_for_everyone()
