"""Which layers of a network its forward pass calls.

A layer may stand in a network without being used: fused projections leave the single ones behind, and some blocks read
a layer's weight without calling it. An adapter there would be trained to nothing and saved as zeros.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn


@contextmanager
def called_layers(network: nn.Module) -> Iterator[set[str]]:
    """Names of the network's innermost modules that are called in the `with` block, filled as they are."""
    called: set[str] = set()

    def noting(name: str) -> object:
        return lambda *_: called.add(name)

    with ExitStack() as stack:
        for name, module in network.named_modules():
            handle = module.register_forward_hook(noting(name))
            stack.callback(handle.remove)
        yield called
