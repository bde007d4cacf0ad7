"""The processes that share a run, through accelerate.

Everything a rank decides alone is derived from global numbers (sample index, epoch, seed), so that results do not
depend on the number of processes beyond rounding.
"""

import json
from collections.abc import Iterable

import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor

from ddpo.validation import UserError
from trainers.parallel.interruption import Interrupted, Signals
from trainers.parallel.shares import share


class Processes:
    """This process's place among all, and the few collectives that training needs.

    Attributes:
        rank: Index of this process.
        count: Number of processes.
        device: Where this process computes.
        signals: What this process was told by signals.
    """

    def __init__(self, *, device: str | None = None) -> None:
        """Joins the processes that torchrun or accelerate launched, or stands alone.

        Args:
            device: `cpu` to stay off the accelerator; None takes this process's own, if it can compute in float64 as
                log-probabilities need: Apple's cannot.
        """
        on_cpu = device == "cpu" or (device is None and torch.backends.mps.is_available())
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        if self._accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise UserError(
                f"accelerate was configured for {self._accelerator.distributed_type.value}, which would have no effect "
                "here: launch with configs/accelerate/multi_gpu_8.yaml (MULTI_GPU) and split the network with "
                "--distributed.strategy fsdp or zero2"
            )
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.device = self._accelerator.device if device is None or self.count > 1 else torch.device(device)
        self.signals = Signals()
        # Small numbers are agreed upon by the CPUs, which then need not wait for what their GPUs still compute.
        self._control: dist.ProcessGroup | None = None
        if self.count > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup), "this process is a member of a group of all"
            self._control = group

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's contiguous part of `total` items; parts differ by at most one."""
        return share(total, rank=self.rank, count=self.count)

    def safe_point(self, phase: str) -> None:
        """Where a run can stop; every process must pass the same ones.

        Args:
            phase: What is going on, for the message.

        Raises:
            Interrupted: On all processes, when a signal has reached any of them.
        """
        number = self.largest(self.signals.received)
        if number:
            raise Interrupted(number, phase)

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        return max(self._everyones(value))

    def agreed(self, value: bool) -> bool:
        """The main process's answer, so that all do the same."""
        return bool(self._everyones(int(value))[0])

    def _everyones(self, value: int) -> list[int]:
        """One number of each process, in rank order, without waiting for the accelerator."""
        if self._control is None:
            return [value]
        values = torch.zeros(self.count, dtype=torch.int64)
        values[self.rank] = value
        dist.all_reduce(values, group=self._control)
        return values.tolist()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors, on `device`, by the main process's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all processes in rank order; processes may have different numbers of rows."""
        if self.count == 1:
            return values
        lengths = self._everyones(len(values))
        padded = torch.zeros(max(lengths), *values.shape[1:], dtype=values.dtype, device=self.device)
        padded[: len(values)] = values
        rows = self._accelerator.gather(padded).unflatten(0, (self.count, -1))
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)]).to(values.device)

    def gather_json(self, value: object) -> list[object]:
        """One JSON-able value of each process, in rank order, on every process."""
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode())]

    def gather_tensors(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """One dictionary of tensors of each process, of any shapes, in rank order, on every process's CPU."""
        own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        return [safetensors.torch.load(data) for data in self._gather_bytes(safetensors.torch.save(own))]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """Byte strings of different lengths, as one tensor: collectives for objects would pickle."""
        if self.count == 1:
            return [data]
        lengths = self._everyones(len(data))
        everything = self.gather(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [piece.numpy().tobytes() for piece in everything.split(lengths)]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes, elementwise, on `device`."""
        if self.count == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Returns once every process is here."""
        self._accelerator.wait_for_everyone()
