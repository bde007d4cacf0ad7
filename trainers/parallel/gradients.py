"""Gradients of all processes added up, once per optimizer step.

Each process accumulates the gradient of its own micro-batches; their losses are parts of a mean over the transitions of
all processes, so the sum is what a single process would have found. That needs no wrapper around the network: processes
may have different numbers of micro-batches, and weights that no loss reaches (the last block of Qwen-Image computes
outputs that nothing reads) stay without gradient, as in one process.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainers.parallel.processes import Processes

BUCKET_ELEMENTS = 2**24  # 64 MiB of float32: large enough for bandwidth, small beside the network


def sum_gradients(parameters: Iterable[nn.Parameter], processes: Processes) -> None:
    """Replaces each gradient by its sum over processes.

    Args:
        parameters: The same on every process, in the same order; those that are split over processes, whose gradients
            the backward pass has added up, are left out. Where only some processes have a gradient, the others
            count as zero; where none has, it stays None.
        processes: Who adds.
    """
    trained = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if processes.count == 1 or not trained:
        return
    present = processes.sum(torch.tensor([float(parameter.grad is not None) for parameter in trained])).tolist()
    reached = [parameter for parameter, count in zip(trained, present, strict=True) if count]
    for parameter in reached:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in reached if parameter.grad is not None]):
        total = processes.sum(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, piece in zip(bucket, total.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, up to the size of a bucket or a single larger tensor."""
    bucket: list[Tensor] = []
    elements = 0
    for gradient in gradients:
        full = elements + gradient.numel() > BUCKET_ELEMENTS
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(gradient)
        elements += gradient.numel()
    if bucket:
        yield bucket
