"""The finite-horizon linear-quadratic problem, time-dependent if wanted, with its exact value.

    dX_t = (A x + B a + b) dt + D dW_t,   r = -(x'Q x + a'R a) / 2,   g(x) = -x'G x / 2 + h'x,   discount rho >= 0

A, B, b, D, Q and R may depend on time. With S = B R^-1 B', the ansatz V(t, x) = -x'P x / 2 + q'x + c turns the
Hamilton-Jacobi-Bellman equation rho V = max_a {r + dV/dt + L^a V} (Fleming and Soner 2006) into

    dP/dt = rho P - Q - A'P - P A + P S P,                 P(T) = G
    dq/dt = rho q - A'q + P S q + P b,                     q(T) = h
    dc/dt = rho c - q'S q / 2 - q'b + tr(D'P D) / 2,       c(T) = 0,       a* = R^-1 B'(q - P x)

by matching powers of x, and these are integrated backwards from T. KL-controlled Gaussian diffusions are the case
B = D, R = alpha I, Q = 0.

B is the batch, n the state's, m the action's and w the noise's dimension: A (n, n), B (n, m), b (n,), Q (n, n),
R (m, m), D (n, w), G (n, n), h (n,).
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from ddpo.control.problems.lqr import Matrix, as_matrix
from ddpo.control.problems.problem import ControlProblem

Vector = NDArray[np.float64]
Coefficient = ArrayLike | Callable[[float], ArrayLike]
"""A constant, or a function of the time."""

_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 1e-12, 1e-14


class LinearGaussian(ControlProblem):
    """The problem and its exact solution; states (B, n), actions (B, m), times in [0, horizon].

    Args:
        A: Drift of the state.
        B: Effect of the action.
        Q: State cost, symmetric; it may be indefinite.
        R: Action cost, symmetric and positive definite.
        D: Noise.
        horizon: T, positive.
        offset: b, zero if left out.
        terminal_cost: G, symmetric, may be indefinite; zero if left out.
        terminal_slope: h, zero if left out.
        discount: rho >= 0, per unit of time.

    Raises:
        ValueError: Shapes disagree, R is not positive definite at the start, middle or end, or the value is infinite
            because P escapes to infinity inside the horizon, which only indefinite costs do.
    """

    def __init__(
        self,
        A: Coefficient,
        B: Coefficient,
        Q: Coefficient,
        R: Coefficient,
        D: Coefficient,
        *,
        horizon: float,
        offset: Coefficient | None = None,
        terminal_cost: ArrayLike | None = None,
        terminal_slope: ArrayLike | None = None,
        discount: float = 0.0,
    ) -> None:
        if not horizon > 0 or discount < 0:
            raise ValueError(f"needs horizon > 0 and discount >= 0, got horizon {horizon}, discount {discount}")
        n, m = as_matrix("B", _function(B)(0.0)).shape
        self.state_dim, self.action_dim = n, m
        self.noise_dim = as_matrix("D", _function(D)(0.0)).shape[1]
        self.horizon, self.discount = float(horizon), float(discount)
        self._A, self._B = _matrices("A", A, (n, n)), _matrices("B", B, (n, m))
        self._Q, self._R = _matrices("Q", Q, (n, n)), _matrices("R", R, (m, m))
        self._D = _matrices("D", D, (n, self.noise_dim))
        self._b = _vectors("offset", np.zeros(n) if offset is None else offset, n)
        self._G = as_matrix("terminal_cost", np.zeros((n, n)) if terminal_cost is None else terminal_cost, (n, n))
        self._h = _vectors("terminal_slope", np.zeros(n) if terminal_slope is None else terminal_slope, n)(0.0)[:, 0]
        self._require_weights()
        self._backwards = self._integrate()

    def _require_weights(self) -> None:
        for t in (0.0, 0.5 * float(self.horizon or 0), float(self.horizon or 0)):
            for name, weight in (("Q", self._Q(t)), ("R", self._R(t)), ("terminal_cost", self._G)):
                if not np.allclose(weight, weight.T, rtol=1e-10, atol=1e-12):
                    raise ValueError(
                        f"{name} must be symmetric at t = {t}; pass its symmetric part, the cost is the same"
                    )
            smallest = float(np.linalg.eigvalsh(self._R(t))[0])
            if smallest <= 0:
                raise ValueError(f"R must be positive definite, its smallest eigenvalue at t = {t} is {smallest:.6g}")

    def _integrate(self) -> Callable[[float], Vector]:
        """(P, q, c), flattened, as a function of the time."""
        n, end = self.state_dim, float(self.horizon or 0)

        def rate(t: float, state: Vector) -> Vector:
            P, q, c = state[: n * n].reshape(n, n), state[n * n : -1], state[-1]
            a, b, offset, d = self._A(t), self._B(t), self._b(t)[:, 0], self._D(t)
            S = b @ np.linalg.solve(self._R(t), b.T)
            dP = self.discount * P - self._Q(t) - a.T @ P - P @ a + P @ S @ P
            dq = self.discount * q - a.T @ q + P @ (S @ q + offset)
            dc = self.discount * c - 0.5 * q @ S @ q - q @ offset + 0.5 * np.trace(d.T @ P @ d)
            return np.concatenate([dP.ravel(), dq, [dc]])

        with np.errstate(over="ignore", invalid="ignore"):
            path = solve_ivp(
                rate,
                (end, 0.0),
                np.concatenate([self._G.ravel(), self._h, [0.0]]),
                method="DOP853",
                dense_output=True,
                rtol=_RELATIVE_TOLERANCE,
                atol=_ABSOLUTE_TOLERANCE,
            )
        if not path.success or not np.isfinite(path.y).all():
            raise ValueError(
                f"the value is infinite before t = {float(path.t[-1]):.6g}: P escapes to infinity there; shorten the "
                "horizon, raise the action cost R or make Q and terminal_cost positive semidefinite"
            )
        dense: Callable[[float], Vector] = path.sol
        return dense

    def coefficients(self, t: float) -> tuple[Matrix, Vector, float]:
        """P (n, n), q (n,) and c of V(t, x) = -x'P x / 2 + q'x + c.

        Raises:
            ValueError: The time is outside [0, horizon].
        """
        end = float(self.horizon or 0)
        if not -1e-9 * end <= t <= (1 + 1e-9) * end:
            raise ValueError(f"the time must be in [0, {end}], got {t}")
        n, state = self.state_dim, self._backwards(min(max(t, 0.0), end))
        P = state[: n * n].reshape(n, n)
        return 0.5 * (P + P.T), state[n * n : -1], float(state[-1])

    def gain(self, t: float) -> tuple[Matrix, Vector]:
        """K (m, n) and k (m,) of the optimal action a*(t, x) = -K x + k."""
        P, q, _ = self.coefficients(t)
        push = np.linalg.solve(self._R(t), self._B(t).T)
        return push @ P, push @ q

    def value(self, t: Tensor | float, x: Tensor) -> Tensor:
        """V*(t, x), (B,), of states (B, n) at one time or (B,) times; differentiable in x only."""
        P = _evaluated(lambda s: self.coefficients(s)[0], t, x)
        q = _evaluated(lambda s: self.coefficients(s)[1][:, None], t, x)
        c = _evaluated(lambda s: np.full((1, 1), self.coefficients(s)[2]), t, x)
        return (x * (_times(q, x.new_ones(1, 1)) - 0.5 * _times(P, x))).sum(-1) + c[:, 0, 0]

    def optimal_action(self, t: Tensor | float, x: Tensor) -> Tensor:
        """a*(t, x), (B, m), of states (B, n) at one time or (B,) times."""
        K = _evaluated(lambda s: self.gain(s)[0], t, x)
        k = _evaluated(lambda s: self.gain(s)[1][:, None], t, x)
        return _times(k, x.new_ones(1, 1)) - _times(K, x)

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """A x + B a + b, (B, n)."""
        offset = _times(_evaluated(self._b, t, x), x.new_ones(1, 1))
        return _times(_evaluated(self._A, t, x), x) + _times(_evaluated(self._B, t, x), a) + offset

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """D, (B, n, w), the same for every state."""
        return _evaluated(self._D, t, x).expand(x.shape[0], -1, -1)

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """-(x'Q x + a'R a) / 2, (B,)."""
        state_cost = (x * _times(_evaluated(self._Q, t, x), x)).sum(-1)
        return -0.5 * (state_cost + (a * _times(_evaluated(self._R, t, x), a)).sum(-1))

    def terminal_reward(self, x: Tensor) -> Tensor:
        """-x'G x / 2 + h'x, (B,)."""
        G, h = torch.from_numpy(self._G).to(x), torch.from_numpy(self._h).to(x)
        return (x * (h - 0.5 * x @ G)).sum(-1)


def _function(coefficient: Coefficient) -> Callable[[float], ArrayLike]:
    if callable(coefficient):
        return coefficient
    constant: ArrayLike = coefficient
    return lambda t: constant


def _matrices(name: str, coefficient: Coefficient, shape: tuple[int, int]) -> Callable[[float], Matrix]:
    """A function of time whose matrices have this shape; a constant is checked here, a function at every call."""
    if callable(coefficient):
        function = coefficient
        return lambda t: as_matrix(name, function(t), shape)
    constant = as_matrix(name, coefficient, shape)
    return lambda t: constant


def _vectors(name: str, coefficient: Coefficient, n: int) -> Callable[[float], Matrix]:
    """As `_matrices`, of vectors (n,), or a number where n = 1, stored as columns (n, 1)."""
    if callable(coefficient):
        function = coefficient
        return lambda t: _column(name, function(t), n)
    constant = _column(name, coefficient, n)
    return lambda t: constant


def _column(name: str, entries: ArrayLike, n: int) -> Matrix:
    column = np.array(entries, dtype=np.float64)
    if column.shape != (n,) and not (n == 1 and column.shape == ()):
        raise ValueError(f"{name} must have shape ({n},), got {column.shape}")
    return as_matrix(name, column.reshape(n, 1))


def _evaluated(function: Callable[[float], Matrix], t: Tensor | float, like: Tensor) -> Tensor:
    """The matrix at one time, (1, i, j), or at (B,) times, (B, i, j)."""
    if not isinstance(t, Tensor) or t.ndim == 0:
        return torch.from_numpy(function(float(t))).to(like).unsqueeze(0)
    times, places = torch.unique(t, return_inverse=True)
    return torch.from_numpy(np.stack([function(float(time)) for time in times])).to(like)[places]


def _times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Matrices (1 or B, i, j) times vectors (1 or B, j), (1 or B, i)."""
    return (matrix @ vectors.unsqueeze(-1)).squeeze(-1)
