"""The generator of a controlled diffusion by automatic differentiation, and the residuals of its HJB equations.

    L^a V(x) = grad V . f(x, a) + 1/2 Tr(Sigma Sigma' hess V),     Sigma = Sigma(x, a)

    infinite horizon   rho V = max_a { r + L^a V }                                    (Fleming and Soner 2006)
    finite horizon     rho V = dV/dt + max_a { r + L_t^a V }
    without noise      -dV/dt = H(t, x, grad V) - rho V,   H(t, x, p) = max_a { r(t, x, a) + p . f(t, x, a) }

The trace is the sum over the columns s_j of Sigma of s_j' (hess V) s_j, so it takes one Hessian-vector product for each
noise and never the Hessian. With z of independent signs, Sigma z has E[(Sigma z)' (hess V) (Sigma z)] equal to that
trace (Hutchinson 1990), so one product for each probe estimates it without bias in any dimension.

A small residual certifies nothing: every root of a Riccati equation, also the one whose policy is unstable, has
residual zero. Hold the value of the closed loop (`ddpo.control.solvers.simulate.closed_loop_value`) against V as well.

    problem = StochasticLQR.example()
    generator(problem.value, problem, x, problem.optimal_action(x))              # (B,)

B is the batch, n the state's, m the action's and w the noise's dimension. Values map (B, n) to (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpo.control.problems.problem import ControlProblem

Value = Callable[[Tensor], Tensor]
"""V, (B,), of states (B, n)."""

TimedValue = Callable[[Tensor, Tensor], Tensor]
"""V(t, x), (B,), of states (B, n) and times (B,)."""

Maximiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The action (B, m) that maximises r + p . f + Tr(Sigma Sigma' H) / 2, of x (B, n), p (B, n) and H (B, n, n)."""


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """A value and its derivatives at B states, detached.

    Attributes:
        value: V, (B,).
        gradient: grad V, (B, n).
        hessian: hess V, (B, n, n).
    """

    value: Tensor
    gradient: Tensor
    hessian: Tensor


def derivatives(value: Value, x: Tensor) -> Derivatives:
    """V, its gradient and its Hessian at states (B, n), without a graph."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        heights = value(x)
        gradient = _gradient(heights, x, keep=True)
        hessian = torch.stack([_gradient(gradient[:, i], x, keep=True) for i in range(x.shape[1])], dim=1)
    return Derivatives(value=heights.detach(), gradient=gradient.detach(), hessian=hessian.detach())


def generator(
    value: Value,
    problem: ControlProblem,
    x: Tensor,
    a: Tensor,
    t: Tensor | float = 0.0,
    *,
    hessian: Literal["exact", "hutchinson"] = "exact",
    generator: torch.Generator | None = None,
    num_probes: int = 1,
) -> Tensor:
    """L^a V, (B,), differentiable in the parameters of V and in a.

    Args:
        value: V, twice differentiable.
        problem: The diffusion.
        x: States, (B, n).
        a: Actions, (B, m).
        t: Time, for problems that depend on it.
        hessian: `exact` takes w Hessian-vector products; `hutchinson` takes `num_probes`, and is noisy but unbiased.
        generator: Source of the probes.
        num_probes: At least 1.

    Raises:
        ValueError: `hessian` is not one of the two, or num_probes is not positive.
    """
    if hessian not in ("exact", "hutchinson"):
        raise ValueError(f"hessian must be 'exact' or 'hutchinson', got {hessian!r}")
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}")
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        sigma, drift = problem.diffusion(x, a, t), problem.drift(x, a, t)
        gradient = _gradient(value(x), x, keep=True)
        if hessian == "exact":
            directions = sigma.unbind(-1)
        else:
            shape = (num_probes, sigma.shape[0], sigma.shape[2])
            signs = 2 * torch.randint(0, 2, shape, generator=generator, device=x.device).to(x) - 1
            directions = tuple((sigma @ probe[:, :, None]).squeeze(-1) / num_probes**0.5 for probe in signs)
        trace = torch.zeros_like(gradient[:, 0])
        for direction in directions:
            fixed = direction.detach()
            product = _gradient((gradient * fixed).sum(-1), x, keep=True)
            # s'Hs with the derivative 2 s'H ds in Sigma, although the product holds its direction constant.
            trace = trace + (product * (2 * direction - fixed)).sum(-1)
        result = (gradient * drift).sum(-1) + 0.5 * trace
    return result if keep else result.detach()


def hamiltonian(
    problem: ControlProblem, x: Tensor, a: Tensor, gradient: Tensor, hessian: Tensor, t: Tensor | float = 0.0
) -> Tensor:
    """R + p . f + Tr(Sigma Sigma' H) / 2, (B,), of a given p = `gradient` (B, n) and H = `hessian` (B, n, n)."""
    sigma = problem.diffusion(x, a, t)
    return (
        problem.reward(x, a, t)
        + (gradient * problem.drift(x, a, t)).sum(-1)
        + 0.5 * (sigma * (hessian @ sigma)).sum((-2, -1))
    )


def hjb_residual(value: Value, problem: ControlProblem, x: Tensor, maximiser: Maximiser) -> Tensor:
    """Rho V - max_a { r + L^a V } at states (B, n), (B,), detached.

    Raises:
        ValueError: The problem has a finite horizon; see `finite_horizon_residual`.
    """
    if problem.horizon is not None:
        raise ValueError(f"the problem has the horizon {problem.horizon}: use finite_horizon_residual")
    at = derivatives(value, x)
    a = maximiser(x, at.gradient, at.hessian)
    with torch.no_grad():
        return problem.discount * at.value - hamiltonian(problem, x, a, at.gradient, at.hessian)


def finite_horizon_residual(
    value: TimedValue, problem: ControlProblem, x: Tensor, t: Tensor, maximiser: Maximiser
) -> Tensor:
    """Rho V - dV/dt - max_a { r + L_t^a V } at states (B, n) and times (B,), (B,), detached."""
    at, slope = derivatives(lambda y: value(y, t), x), _time_derivative(value, x, t)
    a = maximiser(x, at.gradient, at.hessian)
    with torch.no_grad():
        return problem.discount * at.value - slope - hamiltonian(problem, x, a, at.gradient, at.hessian, t)


def deterministic_hjb_residual(
    value: TimedValue, problem: ControlProblem, x: Tensor, t: Tensor, maximiser: Maximiser
) -> Tensor:
    """-dV/dt - H(t, x, grad V) + rho V at states (B, n) and times (B,), (B,), detached.

    V need only be once differentiable, and the maximiser receives zeros for the Hessian.

    Raises:
        ValueError: The problem has noise.
    """
    with torch.enable_grad():
        inputs = x.detach().requires_grad_()
        heights = value(inputs, t)
        gradient = _gradient(heights, inputs, keep=False).detach()
    slope = _time_derivative(value, x, t)
    hessian = x.new_zeros(*x.shape, x.shape[1])
    a = maximiser(x, gradient, hessian)
    with torch.no_grad():
        noise = float(problem.diffusion(x, a, t).abs().max())
        if noise > 0:
            raise ValueError(f"the problem has noise, up to {noise:.3g}: use finite_horizon_residual")
        return problem.discount * heights.detach() - slope - hamiltonian(problem, x, a, gradient, hessian, t)


def _gradient(heights: Tensor, x: Tensor, *, keep: bool) -> Tensor:
    """The gradient of the sum of `heights` in x; zeros where they do not depend on it."""
    if not heights.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(heights.sum(), x, create_graph=keep, materialize_grads=True)
    return gradient


def _time_derivative(value: TimedValue, x: Tensor, t: Tensor) -> Tensor:
    """dV/dt, (B,), detached."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        return _gradient(value(x.detach(), t), t, keep=False).detach()
