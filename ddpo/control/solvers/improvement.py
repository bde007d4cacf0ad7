"""Policy improvement: the action that maximises the Hamiltonian of a value.

    a(x) in argmax_a h(x, a),   h = r(x, a) + grad V . f(x, a) + Tr(Sigma Sigma' hess V) / 2 = rho Q(x, a)

`GreedyPolicy` maximises at each state by Newton's method, whose derivatives in a come from autograd. Where h is
quadratic in a, as for regulators, the first step is exact: the closed form, without having been written down.
`improve_actor` instead moves the parameters of a network up the mean of h over states, V held fixed (Q-improvement).

B is the batch, n the state's and m the action's dimension.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpo.control.problems.problem import ControlProblem
from ddpo.control.solvers.fitting import minimise
from ddpo.control.solvers.generator import Derivatives, Value, derivatives, hamiltonian
from ddpo.control.solvers.simulate import Policy

_MAX_STEPS, _MAX_HALVINGS = 50, 40


def maximise_hamiltonian(
    problem: ControlProblem, x: Tensor, gradient: Tensor, hessian: Tensor, start: Tensor, *, tolerance: float = 1e-12
) -> Tensor:
    """The maximising actions (B, m), by damped Newton steps from `start` (B, m).

    Args:
        problem: Reward, drift and diffusion, twice differentiable in the action.
        x: States, (B, n).
        gradient: p, (B, n).
        hessian: H, (B, n, n).
        start: Where h is finite.
        tolerance: Stops when a step gains what a quadratic would to this accuracy, relative to 1 + |h|.

    Raises:
        ValueError: h is not strictly concave in the action somewhere, or is not finite at the start.
    """
    a = start.detach()
    for _ in range(_MAX_STEPS):
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            heights = hamiltonian(problem, x, a, gradient, hessian)
            (slope,) = torch.autograd.grad(heights.sum(), a, create_graph=True)
            rows = [
                torch.autograd.grad(slope[:, i].sum(), a, retain_graph=True, materialize_grads=True)[0]
                for i in range(a.shape[1])
            ]
        heights, slope, curvature = heights.detach(), slope.detach(), -torch.stack(rows, dim=1)
        if not bool(heights.isfinite().all()):
            raise ValueError("the Hamiltonian is not finite at the action that the search starts from; start elsewhere")
        factor, info = torch.linalg.cholesky_ex(curvature)
        if bool((info != 0).any()):
            worst = x[info != 0][0].tolist()
            raise ValueError(
                f"the Hamiltonian is not strictly concave in the action at x = {worst}, so it has no maximum that "
                "Newton's method finds; improve by an actor, which stays in its range"
            )
        move = torch.cholesky_solve(slope[:, :, None], factor).squeeze(-1)
        foretold = 0.5 * (slope * move).sum(-1)
        a, reached = _damped(problem, x, gradient, hessian, a.detach(), move, heights)
        # A quadratic gains what its slope and curvature foretell, so its first step is exact.
        if float(((reached - heights - foretold).abs() / (1 + heights.abs())).max()) <= tolerance:
            return a
    return a


def _damped(
    problem: ControlProblem, x: Tensor, gradient: Tensor, hessian: Tensor, a: Tensor, move: Tensor, heights: Tensor
) -> tuple[Tensor, Tensor]:
    """A + s move and its Hamiltonian, with s halved at each state until that is not below `heights`."""
    size = torch.ones_like(heights)
    slack = 1e-12 * (1 + heights.abs())
    with torch.no_grad():
        for _ in range(_MAX_HALVINGS):
            reached = hamiltonian(problem, x, a + size[:, None] * move, gradient, hessian)
            worse = ~(reached >= heights - slack)
            if not bool(worse.any()):
                break
            size = torch.where(worse, 0.5 * size, size)
        return a + size[:, None] * move, reached


@dataclass(frozen=True, kw_only=True)
class GreedyPolicy:
    """The policy that is greedy with respect to a value.

    Attributes:
        problem: The problem.
        value: V, twice differentiable; hold a copy of a network that trains on, see `snapshot`.
        start: Policy whose actions the search starts from.
    """

    problem: ControlProblem
    value: Value
    start: Policy

    def __call__(self, x: Tensor) -> Tensor:
        """Actions (B, m) of states (B, n)."""
        at = derivatives(self.value, x)
        return maximise_hamiltonian(self.problem, x, at.gradient, at.hessian, self.start(x).detach())


def snapshot(network: nn.Module) -> nn.Module:
    """A copy with frozen parameters."""
    return copy.deepcopy(network).requires_grad_(False)


def improve_actor(
    problem: ControlProblem, actor: nn.Module, x: Tensor, at: Derivatives, *, max_steps: int, relative: bool = False
) -> float:
    """Moves the actor up the mean of h / rho over states (B, n) by L-BFGS; returns that mean.

    Args:
        problem: The problem.
        actor: Trained in place.
        x: States.
        at: The value's derivatives at x.
        max_steps: Of L-BFGS.
        relative: Divides h by |V| at each state.
    """
    weight = 1 / at.value.abs() if relative else torch.ones_like(at.value)

    def loss() -> Tensor:
        return -(weight * hamiltonian(problem, x, actor(x), at.gradient, at.hessian)).mean() / problem.discount

    return -minimise(loss, actor, max_steps=max_steps)
