"""Minimising a smooth deterministic loss over a network's parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def minimise(loss: Callable[[], Tensor], network: nn.Module, *, max_steps: int, tolerance: float = 1e-16) -> float:
    """Runs L-BFGS with strong Wolfe line searches, changing the network in place; returns the last loss.

    Args:
        loss: The same function of the parameters whenever called.
        network: Whose parameters to change.
        max_steps: Most iterations.
        tolerance: Stops when the loss changes by less, or every slope is below its power 3/4.

    Raises:
        ValueError: The loss is not finite.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=max_steps,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=tolerance**0.75,
        tolerance_change=tolerance,
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        height = loss()
        height.backward()
        return height

    optimiser.step(closure)
    with torch.enable_grad():
        final = float(loss().detach())
    if not abs(final) < float("inf"):
        raise ValueError(f"the loss became {final}; use float64, fewer steps or a smaller domain")
    return final
