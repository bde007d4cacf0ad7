"""Splits the network over processes, so that none holds all of it (FSDP2, `torch.distributed.fsdp.fully_shard`).

    ddp      every process holds the whole network; gradients are added up once per optimizer step (`.gradients`)
    fsdp     weights, gradients and optimizer state are split; the weights of a block are gathered while it computes
             (ZeRO-3, arXiv:1910.02054)
    zero2    the same, but weights once gathered are kept through sampling and from a forward to its backward pass: as
             much memory for weights as ddp, while gradients and optimizer state stay split (ZeRO-2)

One code path serves GPUs and CPUs (gloo). Parameters become `DTensor`s under unchanged names; checkpoints hold them
whole, so that a run can go on in another mode or with another number of processes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ddpo.validation import UserError
from trainers.config.groups import DistributedConfig

if TYPE_CHECKING:  # importing them loads diffusers and accelerate, which `trainers.planning.preflight` does without
    from ddpo import Policy
    from trainers.parallel.processes import Processes


def distribute(policy: "Policy", config: DistributedConfig, processes: "Processes") -> None:
    """Gives every process the main process's weights, whole or its part of them; before an optimizer is made.

    Raises:
        UserError: The network cannot be split, as the processes would call it unequally often.
    """
    processes.broadcast(policy.trainable().values())
    if processes.count == 1 or config.strategy == "ddp":
        return
    if policy.denoiser.calls_differ:
        raise UserError(
            f"distributed.strategy must be ddp, got {config.strategy}: how often the network is called depends on the "
            "prompts or on the steps here, and processes that share its weights must call it equally often"
        )
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for network in policy.networks():
        shard(network, mesh)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a network by blocks over a mesh of one dimension; what is in no block is gathered with the whole."""
    for block in blocks(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for module in _sharded(network):
        module.set_force_sum_reduction_for_comms(True)  # losses are parts of a sum already; gloo and NCCL know sums
        module.set_gradient_divide_factor(1.0)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost entries of module lists that hold weights: transformer blocks, a U-Net's down and up blocks."""
    if isinstance(network, nn.ModuleList):
        entries = [blocks(entry) if isinstance(entry, nn.ModuleList) else [entry] for entry in network]
        return [entry for group in entries for entry in group if next(entry.parameters(), None) is not None]
    return [block for child in network.children() for block in blocks(child)]


def _sharded(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(policy: "Policy", config: DistributedConfig) -> Iterator[None]:
    """With `zero2`: weights once gathered are kept, for the time of a `with` block in which no weight changes."""
    modules = [module for network in policy.networks() for module in _sharded(network)]
    if config.strategy != "zero2" or not modules:
        yield
        return
    _keep_gathered(modules, True)
    try:
        yield
    finally:
        _keep_gathered(modules, False)
        for module in modules:
            module.reshard()


def _keep_gathered(modules: list[FSDPModule], keep: bool) -> None:
    for module in modules:
        module.set_reshard_after_forward(not keep, recurse=False)


# ---- tensors that may be split ---------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; all of a tensor that is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; called on every process where it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one at a time by all processes; empty where they are not to be kept."""
    kept = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            kept[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return kept


def split_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, the same on every process, split as `target` is."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.to_local().device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def norm_of(value: Tensor) -> float:
    """A gradient norm as a number, the same on every process."""
    return float(whole(value))
