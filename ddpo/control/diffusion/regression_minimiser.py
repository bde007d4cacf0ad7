"""What regression on clean samples finds where everything is known: its minimiser at given states, by quadrature.

One-dimensional data of any density on a grid of points z_j, x = a z + s eps. Given x, the data have the posterior

    w_j(x) ~ p(z_j) N(x; a z_j, s^2),    eps_j = (x - a z_j) / s

and the output f minimises sum_j w_j L(f, f*_j, ...), L the objective's own loss (`ddpo.objectives.regression_losses`).
Sums over a uniform grid converge exponentially for smooth integrands.

n points of the grid, m states; all float64, outputs are flow velocities eps - x0.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.objectives.clean_sample_presets import Knobs
from ddpo.objectives.regression_losses import LOSSES, RHO, Compared


@dataclass(frozen=True, kw_only=True)
class Law:
    """Data on a grid.

    Attributes:
        z: Points, (n,), uniform.
        log_density: Up to a constant, (n,).
    """

    z: Tensor
    log_density: Tensor

    def tilted(self, log_weight: Tensor) -> "Law":
        """The law p exp(log_weight) / Z, given (n,)."""
        return replace(self, log_density=self.log_density + log_weight)

    def mean(self, values: Tensor) -> Tensor:
        """The expectation of values (n,)."""
        return torch.softmax(self.log_density, 0) @ values


@dataclass(frozen=True, kw_only=True)
class States:
    """Noised states x = a z + s eps.

    Attributes:
        x: (m,).
        a: Signal level.
        s: Noise level.
    """

    x: Tensor
    a: float
    s: float

    def posterior(self, law: Law) -> Tensor:
        """Of the data, (m, n)."""
        return torch.softmax(law.log_density - 0.5 * ((self.x[:, None] - self.a * law.z) / self.s) ** 2, dim=1)

    def velocities(self, law: Law) -> Tensor:
        """The velocity eps - z that each point of the data stands for, (m, n)."""
        return (self.x[:, None] - self.a * law.z) / self.s - law.z

    def velocity(self, law: Law) -> Tensor:
        """E[eps - z | x], (m,): what a perfect network returns."""
        return (self.posterior(law) * self.velocities(law)).sum(1)


def expected_gradient(
    knobs: Knobs, states: States, law: Law, worth: Tensor, *, output: Tensor, anchor: Tensor, old: Tensor
) -> Tensor:
    """The derivative of the expected loss by the output, at every state, (m,).

    Args:
        knobs: The method; its errors are those of the output.
        states: Where.
        law: Of the samples.
        worth: A of each point of the grid, (n,), within the method's bound.
        output: f, (m,).
        anchor: Its output, (m,).
        old: The old policy's output, (m,).
    """
    weights, data = states.posterior(law), states.velocities(law)

    def each(values: Tensor) -> Tensor:
        return values.expand_as(data).reshape(-1)

    leaf = each(output[:, None])[:, None].clone().requires_grad_()
    compared = Compared(
        output=leaf,
        data=each(data)[:, None],
        anchor=each(anchor[:, None])[:, None],
        old=each(old[:, None])[:, None],
        worth=each(worth),
        noise=torch.full((data.numel(),), states.s / (states.a + states.s), dtype=torch.float64),
    )
    loss = LOSSES[knobs.target](compared, rho=RHO[knobs.normalisation], multiplier=knobs.multiplier, bound=knobs.clip)
    (derivative,) = torch.autograd.grad(loss.sum(), leaf)
    return (weights * derivative.reshape(data.shape)).sum(1)


def minimiser(knobs: Knobs, states: States, law: Law, worth: Tensor, *, anchor: Tensor, old: Tensor) -> Tensor:
    """The output that minimises the expected loss at every state, (m,); valid for squared errors.

    Arguments as for `expected_gradient`.
    """
    assert knobs.normalisation == "none", "the gradient is linear in the output"

    def gradient(output: Tensor) -> Tensor:
        return expected_gradient(knobs, states, law, worth, output=output, anchor=anchor, old=old)

    at_old = gradient(old)
    return old - at_old / (gradient(old + 1) - at_old)
