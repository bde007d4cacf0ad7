"""A particle in a double well, steered at the cost of its path's KL divergence, and its value by finite differences.

    dX_t = (-U'(X_t) + sigma u_t) dt + sigma dW_t,     U(x) = kappa (x^2 - 1)^2
    J = E [ g(X_T) - (alpha/2) int_0^T u_t^2 dt ]

By Girsanov's theorem the running cost is alpha times the KL divergence of the controlled path measure to the free one.
With V = alpha log phi the Hamilton-Jacobi-Bellman equation becomes the linear backward equation (Fleming 1977; Kappen
2005)

    d phi/dt - U' d phi/dx + (sigma^2 / 2) d2 phi/dx2 = 0,   phi(T, x) = e^(g(x)/alpha),   u* = sigma d/dx log phi

whose solution is phi(t, x) = E[e^(g(X_T)/alpha) | X_t = x] over free paths. It has no closed form; Crank-Nicolson in
time and central differences in space solve it to second order in both steps.

B is the batch; states and controls are (B, 1).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline
from scipy.sparse import csc_array, diags_array, eye_array
from scipy.sparse.linalg import splu
from torch import Tensor

from ddpo.control.problems.problem import ControlProblem

_IMPLICIT_STEPS = 2


def to_the_right(x: Tensor) -> Tensor:
    """The terminal reward -(x - 1)^2 / 2, (B,), of states (B, 1): end in the right well."""
    return -0.5 * (x.squeeze(-1) - 1) ** 2


class DoubleWell(ControlProblem):
    """The problem; states and controls (B, 1).

    Args:
        terminal: g, of states (B, 1), giving (B,); bounded above.
        barrier: kappa > 0, the height of the barrier at 0.
        noise: sigma > 0.
        temperature: alpha > 0, the price of one nat of path KL divergence.
        horizon: T > 0.

    Raises:
        ValueError: A parameter is not positive.
    """

    state_dim = action_dim = noise_dim = 1
    discount = 0.0

    def __init__(
        self,
        terminal: Callable[[Tensor], Tensor] = to_the_right,
        *,
        barrier: float = 1.0,
        noise: float = 1.0,
        temperature: float = 0.5,
        horizon: float = 1.0,
    ) -> None:
        for name, number in (
            ("barrier", barrier),
            ("noise", noise),
            ("temperature", temperature),
            ("horizon", horizon),
        ):
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        self.terminal, self.barrier, self.noise = terminal, barrier, noise
        self.temperature, self.horizon = temperature, horizon

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """-U'(x) + sigma u, (B, 1)."""
        return -4 * self.barrier * x * (x**2 - 1) + self.noise * a

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """The constant sigma, (B, 1, 1)."""
        return x.new_full((x.shape[0], 1, 1), self.noise)

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """-(alpha/2) u^2, (B,)."""
        return -0.5 * self.temperature * a.squeeze(-1) ** 2

    def terminal_reward(self, x: Tensor) -> Tensor:
        """g(x), (B,)."""
        return self.terminal(x)


@dataclass(frozen=True, kw_only=True)
class DoubleWellReference:
    """The value and the optimal control on a grid, between whose points log phi is a cubic spline.

    Attributes:
        log_phi: Of (t, x), on [0, T] x [-half_width, half_width].
        temperature: alpha.
        noise: sigma.
        half_width: Where the grid ends.
    """

    log_phi: RectBivariateSpline
    temperature: float
    noise: float
    half_width: float

    def value(self, t: Tensor | float, x: Tensor) -> Tensor:
        """V*(t, x), (B,), of states (B, 1) at one time or (B,) times.

        Raises:
            ValueError: A state is outside the grid.
        """
        return self.temperature * self._evaluated(t, x, 0)

    def optimal_action(self, t: Tensor | float, x: Tensor) -> Tensor:
        """u*(t, x), (B, 1), of states (B, 1) at one time or (B,) times.

        Raises:
            ValueError: A state is outside the grid.
        """
        return self.noise * self._evaluated(t, x, 1).unsqueeze(-1)

    def _evaluated(self, t: Tensor | float, x: Tensor, derivative: int) -> Tensor:
        states = x.detach().squeeze(-1).double().cpu().numpy()
        if states.size and not np.abs(states).max() <= self.half_width:
            raise ValueError(
                f"the reference covers |x| <= {self.half_width}, got {float(np.abs(states).max())}; "
                "solve it with a larger half_width"
            )
        times = t.detach().double().cpu().numpy() if isinstance(t, Tensor) else np.float64(t)
        return torch.from_numpy(self.log_phi.ev(np.broadcast_to(times, states.shape), states, dy=derivative)).to(x)


def solve_double_well(
    problem: DoubleWell, *, num_intervals: int = 1200, num_steps: int = 800, half_width: float = 3.0
) -> DoubleWellReference:
    """Solves the linear backward equation on a grid.

    At the two ends the drift points inwards and outruns the noise, so no boundary value is needed: the second
    derivative is dropped and the first is one-sided, of second order. The first two steps are four implicit Euler steps
    of half the length, which damp what Crank-Nicolson would let ring (Rannacher 1984) without lowering the order.

    Args:
        problem: What to solve.
        num_intervals: Of the grid in space, at least 8.
        num_steps: In time, at least 4.
        half_width: The grid is [-half_width, half_width]; at least 1.5, outside the wells. States used should stay 0.5
            inside.

    Raises:
        ValueError: A size is too small, or the grid is too coarse to keep phi positive.
    """
    if num_intervals < 8 or num_steps < 4 or half_width < 1.5:
        raise ValueError(
            "needs num_intervals >= 8, num_steps >= 4 and half_width >= 1.5, "
            f"got {num_intervals}, {num_steps}, {half_width}"
        )
    horizon = float(problem.horizon or 0)
    states = np.linspace(-half_width, half_width, num_intervals + 1)
    exponents = problem.terminal_reward(torch.from_numpy(states).unsqueeze(-1)).numpy() / problem.temperature
    shift = float(exponents.max())
    paths = _march(_generator(problem, states), np.exp(exponents - shift), horizon / num_steps, num_steps)
    if not paths.min() > 0:
        raise ValueError(
            f"phi has lost its sign on this grid (smallest value {paths.min():.3g}); raise num_intervals and num_steps"
        )
    log_phi = np.log(paths) + shift
    spline = RectBivariateSpline(np.linspace(0, horizon, num_steps + 1), states, log_phi, s=0)
    return DoubleWellReference(
        log_phi=spline, temperature=problem.temperature, noise=problem.noise, half_width=half_width
    )


def _generator(problem: DoubleWell, states: NDArray[np.float64]) -> csc_array:
    """The free process's generator on the grid."""
    spacing = states[1] - states[0]
    drift = -4 * problem.barrier * states * (states**2 - 1)
    advection, diffusion = drift / (2 * spacing), problem.noise**2 / (2 * spacing**2)
    inner = diags_array(
        [(diffusion - advection)[1:], np.full(len(states), -2 * diffusion), (diffusion + advection)[:-1]],
        offsets=[-1, 0, 1],
    ).tolil()
    inner[[0, -1]] = 0.0
    inner[0, :3] = advection[0] * np.array([-3.0, 4.0, -1.0])
    inner[-1, -3:] = advection[-1] * np.array([1.0, -4.0, 3.0])
    return inner.tocsc()


def _march(generator: csc_array, terminal: NDArray[np.float64], dt: float, num_steps: int) -> NDArray[np.float64]:
    """The solution at every time, (num_steps + 1, states), earliest first."""
    identity = eye_array(len(terminal), format="csc")
    solver = splu((identity - 0.5 * dt * generator).tocsc())
    explicit = (identity + 0.5 * dt * generator).tocsr()
    path = [terminal]
    for step in range(num_steps):
        if step < _IMPLICIT_STEPS:
            path.append(solver.solve(solver.solve(path[-1])))
        else:
            path.append(solver.solve(explicit @ path[-1]))
    return np.stack(path[::-1])
