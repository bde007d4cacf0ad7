"""The stochastic linear-quadratic regulator, in any dimension, with its exact solution.

    dX_t = (A X_t + B a_t) dt + D dW_t,     r(x, a) = -(x'Q x + a'R a) / 2,     discount rho

The ansatz V(x) = -x'P x / 2 - c turns the Hamilton-Jacobi-Bellman equation (Kalman 1960; Fleming and Soner 2006) into

    rho P = Q + A'P + P A - P B R^-1 B'P,     c = tr(D'P D) / (2 rho),     a* = -K x,   K = R^-1 B'P

which is the undiscounted Riccati equation of A - (rho/2) I. It has several roots, and each of them makes the residual
of the HJB vanish; the value function is the one whose closed loop A - B K - (rho/2) I is stable, so that
e^(-rho t) E V(X_t) -> 0.

B is the batch, n the state's, m the action's and w the noise's dimension: A (n, n), B (n, m), Q (n, n), R (m, m),
D (n, w).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_continuous_are, solve_continuous_lyapunov, solve_discrete_are
from torch import Tensor

from ddpo.control.problems.problem import ControlProblem

Matrix = NDArray[np.float64]

_ROUNDING = 1e-13
"""Of a singular value, in units of the matrix: backward stable eigenvalues make it about n eps where it is 0."""

_LARGEST_RESIDUAL = 1e-6
"""Of a Riccati solution, in units of the equation's terms."""


@dataclass(frozen=True, kw_only=True)
class RiccatiSolution:
    """An exact solution V(x) = -x'P x / 2 - c, with the optimal action a* = -K x.

    Attributes:
        P: (n, n), symmetric and positive semidefinite.
        c: What the noise costs, in units of the value.
        K: (m, n).
    """

    P: Matrix
    c: float
    K: Matrix


def solve_are(A: ArrayLike, B: ArrayLike, Q: ArrayLike, R: ArrayLike, D: ArrayLike, rho: float) -> RiccatiSolution:
    """The value function and optimal gain of the discounted stochastic regulator.

    Args:
        A: Drift of the state, (n, n) or a number.
        B: Effect of the action, (n, m) or a number.
        Q: State cost, (n, n), symmetric and positive semidefinite.
        R: Action cost, (m, m), symmetric and positive definite.
        D: Noise, (n, w).
        rho: Discount rate, positive, per unit of time.

    Raises:
        ValueError: Shapes disagree, Q, R or rho is out of range, (A - rho/2 I, B) cannot be stabilised, or Q does not
            see an unstable direction; then the stabilising root of the equation is not the value function. Or an
            action reaches an unstable mode so weakly that float64 does not hold the solution.
    """
    a, b, q, r, d = _regulator(A, B, Q, R, D, rho)
    shifted = a - 0.5 * rho * np.eye(len(a))
    _require_stabilisable(shifted, b, rho)
    _require_detectable(shifted, q, rho)
    P = _stabilising_root(shifted, b, q, r)
    K = np.linalg.solve(r, b.T @ P).astype(np.float64)
    return RiccatiSolution(P=P, c=float(np.trace(d.T @ P @ d)) / (2 * rho), K=K)


def solve_discretised(
    A: ArrayLike, B: ArrayLike, Q: ArrayLike, R: ArrayLike, D: ArrayLike, rho: float, dt: float
) -> RiccatiSolution:
    """The exact optimum of the regulator's Euler chain, which a solver that steps by dt converges to.

    The chain is x' = x + (A x + B a) dt + D sqrt(dt) xi, with rewards r(x, a) dt and discount e^(-rho dt) a step; its
    Riccati equation is the undiscounted one of e^(-rho dt/2) (I + A dt) and e^(-rho dt/2) B dt. Its gain differs from
    that of continuous time by O(dt).

    Args:
        A: As for `solve_are`, like B, Q, R, D and rho.
        B: Effect of the action.
        Q: State cost.
        R: Action cost.
        D: Noise.
        rho: Discount rate.
        dt: Time step, positive.

    Raises:
        ValueError: As `solve_are`, or the step is not positive.
    """
    a, b, q, r, d = _regulator(A, B, Q, R, D, rho)
    if dt <= 0:
        raise ValueError(f"the time step dt must be positive, got {dt}")
    solve_are(a, b, q, r, d, rho)
    gamma = np.exp(-rho * dt)
    step, push = np.sqrt(gamma) * (np.eye(len(a)) + a * dt), np.sqrt(gamma) * b * dt
    P = solve_discrete_are(step, push, q * dt, r * dt)
    P = 0.5 * (P + P.T)
    K = np.linalg.solve(r * dt + push.T @ P @ push, push.T @ P @ step)
    return RiccatiSolution(P=P, c=float(gamma * dt * np.trace(d.T @ P @ d) / (2 * (1 - gamma))), K=K)


def discretised_gain(
    A: ArrayLike, B: ArrayLike, Q: ArrayLike, R: ArrayLike, D: ArrayLike, rho: float, dt: float
) -> Matrix:
    """The gain K (m, n) of `solve_discretised`; the noise D does not change it."""
    return solve_discretised(A, B, Q, R, D, rho, dt).K


def richardson(fine: Matrix, coarse: Matrix) -> Matrix:
    """Removes the error of first order in dt from a result at dt and the same at 2 dt: 2 fine - coarse."""
    return 2 * fine - coarse


class StochasticLQR(ControlProblem):
    """The regulator as a control problem; states (B, n), actions (B, m).

    Args:
        A: Drift of the state, (n, n) or a number.
        B: Effect of the action, (n, m) or a number.
        Q: State cost, (n, n), symmetric and positive semidefinite.
        R: Action cost, (m, m), symmetric and positive definite.
        D: Noise, (n, w).
        discount: rho, positive, per unit of time.

    Raises:
        ValueError: See `solve_are`; raised here, at construction.
    """

    def __init__(
        self, A: ArrayLike, B: ArrayLike, Q: ArrayLike, R: ArrayLike, D: ArrayLike, *, discount: float
    ) -> None:
        self._solution = solve_are(A, B, Q, R, D, discount)
        a, b, q, r, d = _regulator(A, B, Q, R, D, discount)
        self.A, self.B, self.Q, self.R, self.D = (torch.from_numpy(matrix) for matrix in (a, b, q, r, d))
        self.state_dim, self.action_dim, self.noise_dim = len(a), b.shape[1], d.shape[1]
        self.discount = float(discount)

    @classmethod
    def example(cls) -> "StochasticLQR":
        """The scalar benchmark: A = -0.5, B = 1, Q = 1, R = 0.1, D = 0.3, rho = 0.1."""
        return cls(-0.5, 1.0, 1.0, 0.1, 0.3, discount=0.1)

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """A x + B a, (B, n)."""
        return x @ self.A.to(x).T + a @ self.B.to(x).T

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """D, (B, n, w), the same for every state."""
        return self.D.to(x).expand(x.shape[0], -1, -1)

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """-(x'Q x + a'R a) / 2, (B,)."""
        return -0.5 * (_quadratic(x, self.Q) + _quadratic(a, self.R))

    def solution(self) -> RiccatiSolution:
        """The exact solution."""
        return self._solution

    def value(self, x: Tensor) -> Tensor:
        """V*(x), (B,), of states (B, n)."""
        return -0.5 * _quadratic(x, torch.from_numpy(self._solution.P)) - self._solution.c

    def optimal_action(self, x: Tensor) -> Tensor:
        """a*(x) = -K x, (B, m), of states (B, n)."""
        return -x @ torch.from_numpy(self._solution.K).to(x).T

    def policy_value(self, K: ArrayLike) -> tuple[Matrix, float]:
        """The value -x'P x / 2 - c of the linear policy a = -K x, by its Lyapunov equation.

        With F = A - B K - (rho/2) I, F'P + P F + Q + K'R K = 0 and c = tr(D'P D) / (2 rho).

        Args:
            K: Gain, (m, n) or a number.

        Returns:
            P (n, n) and c.

        Raises:
            ValueError: The shape is wrong, or F is unstable, where the policy's cost is infinite.
        """
        gain = as_matrix("K", K, (self.action_dim, self.state_dim))
        a, b, q, r, d = (matrix.numpy() for matrix in (self.A, self.B, self.Q, self.R, self.D))
        F = a - b @ gain - 0.5 * self.discount * np.eye(self.state_dim)
        growth = float(np.linalg.eigvals(F).real.max())
        if growth >= 0:
            raise ValueError(
                "the policy a = -K x has no finite value: A - B K - rho/2 I has an eigenvalue with real part "
                f"{growth:.6g} >= 0; start from a gain that stabilises it, such as solution().K"
            )
        P = solve_continuous_lyapunov(F.T, -(q + gain.T @ r @ gain))
        P = 0.5 * (P + P.T)
        return P, float(np.trace(d.T @ P @ d)) / (2 * self.discount)


def _quadratic(x: Tensor, weight: Tensor) -> Tensor:
    """The form x'W x, (B,)."""
    return ((x @ weight.to(x)) * x).sum(-1)


def as_matrix(name: str, entries: ArrayLike, shape: tuple[int, int] | None = None) -> Matrix:
    """A copy as a finite float64 matrix; a number is (1, 1)."""
    matrix = np.array(entries, dtype=np.float64)
    if matrix.ndim == 0:
        matrix = matrix.reshape(1, 1)
    if matrix.ndim != 2 or matrix.shape != (shape or matrix.shape):
        raise ValueError(f"{name} must be a matrix of shape {shape or '(rows, columns)'}, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got {matrix.tolist()}")
    return matrix


def _regulator(
    A: ArrayLike, B: ArrayLike, Q: ArrayLike, R: ArrayLike, D: ArrayLike, rho: float
) -> tuple[Matrix, Matrix, Matrix, Matrix, Matrix]:
    """The five matrices, checked against each other, and rho."""
    b = as_matrix("B", B)
    n, m = b.shape
    a, q, r, d = as_matrix("A", A, (n, n)), as_matrix("Q", Q, (n, n)), as_matrix("R", R, (m, m)), as_matrix("D", D)
    if len(d) != n:
        raise ValueError(f"D must have one row for each of the {n} states, got shape {d.shape}")
    for name, weight in (("Q", q), ("R", r)):
        if not np.allclose(weight, weight.T, rtol=1e-10, atol=1e-12):
            raise ValueError(f"{name} must be symmetric; pass ({name} + {name}') / 2, which gives the same cost")
    smallest_q, smallest_r = float(np.linalg.eigvalsh(q)[0]), float(np.linalg.eigvalsh(r)[0])
    if smallest_q < -1e-10 * max(1.0, float(np.abs(q).max())):
        raise ValueError(f"the state cost Q must be positive semidefinite, its smallest eigenvalue is {smallest_q:.6g}")
    if smallest_r <= 0:
        raise ValueError(f"the action cost R must be positive definite, its smallest eigenvalue is {smallest_r:.6g}")
    if not rho > 0:
        raise ValueError(f"the discount rate must be positive for a finite value over an infinite horizon, got {rho}")
    return a, b, q, r, d


def _stabilising_root(shifted: Matrix, b: Matrix, q: Matrix, r: Matrix) -> Matrix:
    """The root P (n, n) of the Riccati equation whose closed loop is stable."""
    try:
        P = solve_continuous_are(shifted, b, q, r)
    except np.linalg.LinAlgError:
        P = np.full_like(shifted, np.nan)
    P = 0.5 * (P + P.T)
    terms = np.stack([shifted.T @ P, P @ shifted, -P @ b @ np.linalg.solve(r, b.T @ P), q])
    off = float(np.abs(terms.sum(0)).max() / np.abs(terms).sum(0).max())
    if not off < _LARGEST_RESIDUAL:
        unstable = [mode for mode in np.linalg.eigvals(shifted) if mode.real >= 0]
        weakest = min((_reach(shifted, b, mode) for mode in unstable), default=float(np.abs(b).max()))
        raise ValueError(
            f"the pair (A, B) is stabilisable, but float64 does not hold the solution: the weakest push on an "
            f"unstable mode is {weakest:.1e}, and the gain grows with its inverse; push that mode harder in B"
        )
    return P


def _reach(shifted: Matrix, seen: Matrix, mode: complex) -> float:
    """How far the columns of `seen` reach a mode of the drift: 0 if they do not (Hautus test)."""
    both = np.hstack([shifted - mode * np.eye(len(shifted)), seen])
    return float(np.linalg.svd(both, compute_uv=False)[-1])


def _unreached(shifted: Matrix, seen: Matrix) -> list[complex]:
    """Unstable eigenvalues of the drift whose modes the columns of `seen` do not reach, to rounding."""
    scale = 1.0 + float(np.abs(shifted).max())
    return [
        complex(mode)
        for mode in np.linalg.eigvals(shifted)
        if mode.real >= -1e-12 * scale and _reach(shifted, seen, mode) < _ROUNDING * scale
    ]


def _require_stabilisable(shifted: Matrix, b: Matrix, rho: float) -> None:
    modes = _unreached(shifted, b)
    if modes:
        raise ValueError(
            f"not stabilisable: no action reaches the mode of A with growth rate {modes[0].real + rho / 2:.6g}, which "
            f"must be below rho/2 = {rho / 2:.6g}; change B to reach it or raise the discount rate"
        )


def _require_detectable(shifted: Matrix, q: Matrix, rho: float) -> None:
    modes = _unreached(shifted.T, q)
    if modes:
        raise ValueError(
            f"Q does not see the mode of A with growth rate {modes[0].real + rho / 2:.6g} >= rho/2 = {rho / 2:.6g}, so "
            "stabilising it is not optimal and the Riccati root is not the value; give that mode a positive cost"
        )
