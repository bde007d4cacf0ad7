"""Counts the bytes that are alive, and the FLOPs, while a network runs on tensors without data.

A pass on torch's meta device creates and frees the same tensors as a pass on a GPU, in the same order and of the same
sizes, and computes nothing. Every storage that an operation returns is counted from its birth until Python or autograd
drops it, so that the largest sum is the peak memory of the pass, gradient checkpointing included. What CUDA does
differently from the meta device is put in its place: autocast's choice of precision, and fused attention.

Not counted: workspaces of cuDNN and cuBLAS, and what the allocator loses by fragmentation.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

HALF = (torch.float16, torch.bfloat16)
FLASH_HEAD_SIZE = 256  # the largest that the flash kernels take

# The lists of torch's autocast for CUDA, as far as denoisers and decoders use them.
_REDUCED = frozenset({
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, functional.conv_transpose2d,
    functional.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.baddbmm, torch.mm, torch.addmm,
    torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.baddbmm, Tensor.mm, Tensor.addmm,
})  # fmt: skip
_FLOAT32 = frozenset({
    functional.group_norm, torch.group_norm, functional.layer_norm, torch.layer_norm, functional.softmax,
    torch.softmax, Tensor.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.exp,
    Tensor.exp, torch.log, Tensor.log, torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, functional.softplus,
    torch.norm, functional.normalize,
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass needs.

    Attributes:
        peak: Most bytes alive at a time, parameters and inputs not included.
        flops: Floating-point operations of matrix products, convolutions and attention.
    """

    peak: int
    flops: int


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations return while the mode is on, and FLOPs.

    `torch.utils.flop_counter.FlopCounterMode` gives the same FLOPs, but its module hooks keep activations alive.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive so far.
        flops: Floating-point operations so far, by torch's formulas.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        """Starts at 0.

        Args:
            ignored: Parameters and inputs: they, and views of them, are not counted.
        """
        super().__init__()
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in ignored:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Runs an operation and counts its work and what is new in its result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tree_map_only(Tensor, self._count, result)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            weakref.finalize(storage, self._free, size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return tensor

    def _free(self, size: int) -> None:
        self.live -= size


class CudaKernels(TorchFunctionMode):
    """Gives operations the precision of CUDA's autocast, and attention its fused kernels, whatever the device."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        """Sets the mode up.

        Args:
            autocast: Reduced precision; None where autocast is off.
        """
        super().__init__()
        self._autocast = autocast

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Runs a function of torch on inputs of the precision that it would have."""
        kwargs = kwargs or {}
        if self._autocast is not None and (func in _REDUCED or func in _FLOAT32):
            target = self._autocast if func in _REDUCED else torch.float32
            args, kwargs = tree_map_only(Tensor, lambda tensor: _cast(tensor, target), (args, dict(kwargs)))
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)  # type: ignore[arg-type]
        return func(*args, **kwargs)


def _cast(tensor: Tensor, target: torch.dtype) -> Tensor:
    return tensor.to(target) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that CUDA chooses: flash for half precision without a mask, else memory-efficient."""
    assert not enable_gqa, "grouped queries are not simulated"
    if query.dtype in HALF and attn_mask is None and query.shape[-1] <= FLASH_HEAD_SIZE:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)[0]


def account(
    run: Callable[[], object], *, ignored: Iterable[Tensor], autocast: torch.dtype | None = None, as_cuda: bool = True
) -> Cost:
    """Runs something and counts.

    Args:
        run: Runs the network, and a backward pass where there is one, on tensors of the meta device (or real ones).
        ignored: Parameters and inputs, which are counted elsewhere.
        autocast: Reduced precision in which the network runs; None for its weights' own.
        as_cuda: Whether precision and attention are chosen as on a GPU.
    """
    with CudaKernels(autocast) if as_cuda else nullcontext(), LiveBytes(ignored) as counted:
        run()
    return Cost(peak=counted.peak, flops=counted.flops)


def saved_for_backward(run: Callable[[], object], *, ignored: Iterable[Tensor]) -> tuple[object, int]:
    """Runs a forward pass and adds up what autograd keeps for the backward pass, each storage once.

    Args:
        run: The forward pass.
        ignored: Parameters, which are kept anyway.

    Returns:
        What `run` returned, and bytes.
    """
    known = {tensor.untyped_storage()._cdata for tensor in ignored}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(storage.nbytes() for storage in kept.values())
