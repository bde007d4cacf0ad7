"""The processes that share a run, through accelerate.

Everything a rank decides alone is derived from global numbers (sample index, epoch, seed), so that results do not
depend on the number of processes beyond rounding.
"""

import json

import safetensors.torch
import torch
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
        return share_of(total, rank=self.rank, count=self.count)

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over all processes in the backward pass."""
        return network if self.count == 1 else self._accelerator.prepare_model(network)

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in rank order; every process passes the same number of rows."""
        return values if self.count == 1 else self._accelerator.gather(values.to(self.device)).to(values.device)

    def gather_json(self, value: object) -> list[object]:
        """One JSON-able value of each process, in rank order, on every process."""
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode())]

    def gather_tensors(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """One dictionary of tensors of each process, of any shapes, in rank order, on every process's CPU."""
        own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        return [safetensors.torch.load(data) for data in self._gather_bytes(safetensors.torch.save(own))]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """Byte strings of different lengths, padded to one tensor: collectives for objects would pickle."""
        if self.count == 1:
            return [data]
        lengths = self.gather(torch.tensor([len(data)])).tolist()
        padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
        padded[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.gather(padded)
        return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, elementwise."""
        return values if self.count == 1 else self._accelerator.reduce(values.to(self.device), "sum")

    def wait(self) -> None:
        """Returns once every process is here."""
        self._accelerator.wait_for_everyone()


def share_of(total: int, *, rank: int, count: int) -> range:
    """The contiguous part of `total` items that falls to one of `count` processes."""
    return range(total * rank // count, total * (rank + 1) // count)
