"""A controlled diffusion and what is earned along it.

    dX_t = f(t, X_t, a_t) dt + Sigma(t, X_t, a_t) dW_t

    infinite horizon   J = E int_0^inf e^(-rho t) r(X_t, a_t) dt
    finite horizon T   J = E [ int_0^T e^(-rho t) r(t, X_t, a_t) dt + e^(-rho T) g(X_T) ]

Its Hamilton-Jacobi-Bellman equation (Fleming and Soner 2006); L^a as in `ddpo.control.solvers.generator`:

    rho V(x) = max_a { r(x, a) + L^a V(x) }                                   infinite horizon
    rho V(t, x) = max_a { r(t, x, a) + dV/dt (t, x) + L_t^a V(t, x) },   V(T, x) = g(x)

Rewards are maximised. B is the batch, n the state's, m the action's and w the noise's dimension.
"""

from abc import ABC, abstractmethod

from torch import Tensor


class ControlProblem(ABC):
    """A controlled diffusion.

    All methods are pure and differentiable in x and a, work in any floating dtype, and take the time t as a float or a
    (B,) tensor, which autonomous problems ignore.

    Attributes:
        state_dim: n.
        action_dim: m.
        noise_dim: w.
        discount: rho >= 0, per unit of time.
        horizon: T, or None for an infinite horizon, which needs discount > 0.
    """

    state_dim: int
    action_dim: int
    noise_dim: int
    discount: float
    horizon: float | None = None

    @abstractmethod
    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """f(t, x, a), (B, n), of states (B, n) and actions (B, m)."""

    @abstractmethod
    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Sigma(t, x, a), (B, n, w)."""

    @abstractmethod
    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """r(t, x, a), (B,), per unit of time."""

    def terminal_reward(self, x: Tensor) -> Tensor:
        """g(x), (B,); zero unless a problem says otherwise."""
        return x.new_zeros(x.shape[0])
