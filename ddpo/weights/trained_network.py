"""A network of which something is trained, run with the trained weights or for the time of a `with` block with others.

    pretrained    the adapter is off, or, where all weights are trained, the frozen copy runs (`reference`)
    named ones    an old or an average policy, another LoRA: they stand in for the trained ones (`using`)

Nothing is copied for these. Weights that stand in are other tensors, not other values of the same tensors, so that a
graph that was recorded before, inside or after the block keeps the weights that it was recorded with.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ddpo.pipeline.network import Network, compiled
from ddpo.pipeline.quantization import is_quantized
from ddpo.validation import UserError
from ddpo.weights.adapter import AdapterConfig, FullConfig, adapter_off, attach, constant, pretrained_copy


class TrainedNetwork:
    """A network and what is trained of it.

    Attributes:
        network: What is called.
        adapter: What is trained; None for nothing.
    """

    def __init__(self, network: Network, adapter: AdapterConfig | None, *, used: Collection[str], seed: int) -> None:
        """Makes what an adapter says trainable.

        Args:
            network: The pretrained network; its module is changed in place.
            adapter: LoRA, all weights, or nothing.
            used: Names of the modules that the network's forward pass calls.
            seed: Of the adapter's initialisation.

        Raises:
            UserError: The weights are quantised and all are to be trained, or the adapter does not fit.
        """
        self.network = network
        self.adapter = adapter
        self._num_references = 0  # blocks of `reference` that are open
        self._pretrained: nn.Module | None = None
        if isinstance(adapter, FullConfig):
            if is_quantized(network.module):
                raise UserError("quantised weights cannot be trained; use a LoraConfig, or load without quantization")
            self._pretrained = pretrained_copy(network.module)
        if adapter is not None:
            attach(network.module, adapter, used=used, seed=seed)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: value for name, value in self.network.module.named_parameters() if value.requires_grad}

    def modules(self) -> list[nn.Module]:
        """The trained network and, where the pretrained weights are a second copy, that one."""
        module = self.network.module
        return [module] if self._pretrained is None else [module, self._pretrained]

    def compile(self, batch_sizes: Collection[int], *, backend: str) -> None:
        """Compiles the network, and the pretrained copy where there is one, for these numbers of samples per call."""
        self.network.compile(batch_sizes, backend=backend)
        if self._pretrained is not None:
            self._pretrained = compiled(self._pretrained, backend=backend)

    @contextmanager
    def reference(self, *, grad: bool = False) -> Iterator[None]:
        """The pretrained weights; see `ddpo.Policy.reference`."""
        weights: AbstractContextManager[None] = nullcontext()
        if self._pretrained is None:
            pretrained = adapter_off(self.network.module)
        else:
            pretrained = self.network.calling(self._pretrained)
            weights = constant(self._pretrained) if grad else weights
        self._num_references += 1
        try:
            with self._recording(grad), weights, pretrained:
                yield
        finally:
            self._num_references -= 1

    @contextmanager
    def using(self, weights: Mapping[str, Tensor], *, grad: bool = False) -> Iterator[None]:
        """Named weights in place of the trained ones; see `ddpo.Policy.using`."""
        if self._num_references:
            raise UserError("the pretrained weights run inside reference(), where no others can: leave its block first")
        module = self.network.module
        _scatter(module)
        own = self.trainable()
        check_weights(weights, own)
        split = any(isinstance(value, DTensor) for value in own.values())
        if split and grad:
            raise UserError(
                "other weights of a network that is split over processes run without gradients only, since its "
                "backward pass gathers the trained ones; use distributed.strategy: ddp"
            )
        substituted = exchanged(module, own, weights) if split else replaced(module, own, weights, grad=grad)
        with self._recording(grad), substituted:
            yield

    @contextmanager
    def moving(self, direction: Mapping[str, Tensor]) -> Iterator[None]:
        """Forward derivatives along a direction in the trained weights; see `ddpo.Policy.moving`."""
        own = self.trainable()
        check_weights(direction, own)
        with dual(self.network.module, own, direction):
            yield

    @contextmanager
    def _recording(self, grad: bool) -> Iterator[None]:
        """With or without a graph; with one, all activations are kept, as they would be recomputed after the block."""
        module = self.network.module
        recomputes = grad and module.is_gradient_checkpointing
        if recomputes:
            module.disable_gradient_checkpointing()
        try:
            with torch.enable_grad() if grad else torch.no_grad():
                yield
        finally:
            if recomputes:
                module.enable_gradient_checkpointing()


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of a policy.

    Args:
        weights: By name.
        own: The trained parameters by name.

    Raises:
        UserError: A name is missing or unknown, or a shape differs.
    """
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    for problem, names in (("missing", missing), ("not among the trained weights", unknown)):
        if names:
            raise UserError(f"{len(names)} of {len(own)} weights are {problem}, such as {min(names)}; give all of "
                             "trainable() by their names")  # fmt: skip
    if wrong:
        raise UserError(
            f"weight {wrong[0]} has shape {tuple(weights[wrong[0]].shape)}, but the policy's has "
            f"{tuple(own[wrong[0]].shape)}; take weights of a policy with the same adapter"
        )


@contextmanager
def dual(module: nn.Module, own: Mapping[str, nn.Parameter], direction: Mapping[str, Tensor]) -> Iterator[None]:
    """Dual numbers in the places of a module's parameters, whose graph still ends in these.

    Args:
        module: The network.
        own: Its trained parameters by name.
        direction: Tangents by name.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    duals = {name: forward_ad.make_dual(parameter, direction[name].to(parameter)) for name, parameter in own.items()}
    places = [
        (owner._parameters, key, parameter)
        for owner in module.modules()
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    ]
    try:
        for table, key, parameter in places:
            table[key] = duals[names[id(parameter)]]
        yield
    finally:
        for table, key, parameter in places:
            table[key] = parameter


@contextmanager
def replaced(
    module: nn.Module, own: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], *, grad: bool
) -> Iterator[None]:
    """Other tensors in the places of a module's parameters.

    Args:
        module: The network.
        own: Its trained parameters by name.
        weights: What stands in for them; converted to their device and precision where these differ.
        grad: Whether a graph is recorded, in which they are constants. Without one they count as trainable, as the
            parameters do: a compiled network need not be compiled again for them.
    """
    names = {id(parameter): name for name, parameter in own.items()}
    places = [
        (owner, key, parameter)
        for owner in module.modules()
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    ]
    with torch.no_grad():
        stand_ins = {
            name: nn.Parameter(weights[name].detach().to(parameter.device, parameter.dtype), requires_grad=not grad)
            for name, parameter in own.items()
        }
    try:
        for owner, key, parameter in places:
            setattr(owner, key, stand_ins[names[id(parameter)]])
        yield
    finally:
        for owner, key, parameter in places:
            setattr(owner, key, parameter)


@contextmanager
def exchanged(module: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in the parameters of a network that is split over processes; exactly as they were afterwards.

    What was gathered before is gathered again, as each of the processes holds a part of the values alone.

    Args:
        module: The network.
        own: Its trained parameters by name.
        weights: Theirs for the time of the block, split in the same way.

    Raises:
        UserError: A weight is not split as its parameter is.
    """
    for name, parameter in own.items():
        value = weights[name]
        if isinstance(parameter, DTensor) and (
            not isinstance(value, DTensor) or value.placements != parameter.placements
        ):
            raise UserError(f"weight {name} must be split over the processes as the policy's is; give a clone of it")
    kept = {name: parameter.detach().clone() for name, parameter in own.items()}
    try:
        _fill(module, own, weights)
        yield
    finally:
        _fill(module, own, kept)


@torch.no_grad()
def _fill(module: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    _scatter(module)
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def _scatter(module: nn.Module) -> None:
    """Lets go of weights that were gathered from all processes; of a network that is whole, nothing."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
