"""The discounted linear-quadratic regulator over an infinite horizon, with coefficients that repeat: V depends on time.

    dX_t = (A(t) X + B(t) a) dt + D(t) dW_t,   r = -(x'Q(t) x + a'R(t) a) / 2,   all of period tau, discount rho

The problem after a period is the problem before it, so V(t, x) = -x'P(t) x / 2 - c(t) is periodic, and its
Hamilton-Jacobi-Bellman equation rho V = max_a {r + dV/dt + L_t^a V} says

    -dP/dt = Q + A'P + P A - P B R^-1 B'P - rho P,        P(t + tau) = P(t)
    -dc/dt = tr(D'P D) / 2 - rho c,                       c(t + tau) = c(t),        a* = -R^-1 B'P(t) x

P(0) is the fixed point of what one period does to a terminal cost, a contraction from 0 where (A - rho/2, B) is
stabilisable and Q sees what is unstable (Bittanti, Colaneri and De Nicolao 1991). The offset of one period with nothing
behind it, k, gives c(0) = k / (1 - e^(-rho tau)).

B is the batch, n, m and w the dimensions of states, actions and noise.
"""

import math
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ddpo.control.problems.linear_gaussian import Coefficient, LinearGaussian
from ddpo.control.problems.lqr import Matrix
from ddpo.control.problems.problem import ControlProblem

_TOLERANCE, _LARGEST = 1e-11, 1e12
_MAX_PERIODS = 500


class PeriodicLQR(ControlProblem):
    """The problem and its exact solution; states (B, n), actions (B, m), any time.

    Args:
        A: Drift of the state, a function of the time in [0, period] or a constant, like B, Q, R and D.
        B: Effect of the action.
        Q: State cost, symmetric and positive semidefinite.
        R: Action cost, symmetric and positive definite.
        D: Noise.
        period: tau, positive.
        discount: rho, positive, per unit of time.

    Raises:
        ValueError: A number is out of range, shapes disagree, or the cost of a period does not settle: no action
            holds the state, or too many periods are needed.
    """

    def __init__(
        self, A: Coefficient, B: Coefficient, Q: Coefficient, R: Coefficient, D: Coefficient, *, period: float,
        discount: float,
    ) -> None:  # fmt: skip
        if not (period > 0 and discount > 0):
            raise ValueError(f"needs period > 0 and discount > 0, got period {period}, discount {discount}")
        self.period, self.discount = float(period), float(discount)
        one_period = partial(LinearGaussian, A, B, Q, R, D, horizon=period, discount=discount)
        self._one = _settled(one_period, self.period)
        self.state_dim, self.action_dim, self.noise_dim = (
            self._one.state_dim, self._one.action_dim, self._one.noise_dim
        )  # fmt: skip
        fresh = -self._one.coefficients(0.0)[2]
        self._offset = fresh / -math.expm1(-discount * period)

    def coefficients(self, t: float) -> tuple[Matrix, float]:
        """P (n, n) and c of V(t, x) = -x'P x / 2 - c."""
        phase = t % self.period
        P, _, rest = self._one.coefficients(phase)
        return P, -rest + math.exp(-self.discount * (self.period - phase)) * self._offset

    def gain(self, t: float) -> Matrix:
        """K (m, n) of the optimal action a*(t, x) = -K x."""
        return self._one.gain(t % self.period)[0]

    def value(self, t: float, x: Tensor) -> Tensor:
        """V*(t, x), (B,), of states (B, n)."""
        P, c = self.coefficients(t)
        return -0.5 * ((x @ torch.from_numpy(P).to(x)) * x).sum(1) - c

    def optimal_action(self, t: float, x: Tensor) -> Tensor:
        """a*(t, x), (B, m), of states (B, n)."""
        return -x @ torch.from_numpy(self.gain(t)).to(x).T

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """A x + B a, (B, n)."""
        return self._one.drift(x, a, t % self.period)

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """D, (B, n, w), the same for every state."""
        return self._one.diffusion(x, a, t % self.period)

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """-(x'Q x + a'R a) / 2, (B,)."""
        return self._one.reward(x, a, t % self.period)


def _settled(one_period: "partial[LinearGaussian]", period: float) -> LinearGaussian:
    """One period whose terminal cost is the cost at its start."""
    terminal: ArrayLike | None = None
    before: Matrix | None = None
    for _ in range(_MAX_PERIODS):
        problem = one_period(terminal_cost=terminal)
        P = problem.coefficients(0.0)[0]
        if before is not None and float(np.abs(P - before).max()) <= _TOLERANCE * float(np.abs(P).max()):
            return problem
        if not float(np.abs(P).max()) < _LARGEST:
            break
        terminal = before = P
    raise ValueError(
        f"the cost P does not settle over periods of {period:g}: it is {float(np.abs(P).max()):.3g} and grows; raise "
        "the discount, or let an action push every mode that grows faster than half of it"
    )
