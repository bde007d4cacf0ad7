"""Merton's portfolio problem, with its exact solution.

    dX_t = [r_f + pi (mu - r_f) - k] X_t dt + pi sigma X_t dW_t,   r(x, a) = (k x)^(1-gamma) / (1-gamma),   discount rho

Wealth x > 0 is split between a bond of return r_f and a share pi of a risky asset; k is what is consumed, as a rate
relative to wealth. The ansatz V(x) = A x^(1-gamma) / (1-gamma) solves the Hamilton-Jacobi-Bellman equation
(Merton 1969) with

    pi* = (mu - r_f) / (gamma sigma^2),     M = r_f + (mu - r_f)^2 / (2 gamma sigma^2),
    k* = (rho - (1-gamma) M) / gamma,       A = k*^(-gamma)

and lifetime utility is finite where rho > (1-gamma) M. Constant controls have an exact value too, because log X is then
a Brownian motion with drift: E X_t^(1-gamma) = x^(1-gamma) e^((1-gamma) G t) with
G = r_f + pi (mu - r_f) - k - gamma (pi sigma)^2 / 2.

At gamma = 1 the utility is its limit up to a constant, r = log(k x), and V(x) = A log x + c with the same pi*, k* = rho
and A = 1/rho; constant controls have c = [log k + G / rho] / rho, since E log X_t = log x + G t.

B is the batch; states are (B, 1), actions (B, 2) = (pi, k).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.control.problems.problem import ControlProblem


@dataclass(frozen=True, kw_only=True)
class MertonSolution:
    """The optimum; both controls are constant in wealth and time.

    Attributes:
        risky_share: pi*, as a fraction of wealth.
        consumption_rate: k*, per unit of time, relative to wealth.
        growth: M, the best certainty-equivalent growth rate before consumption, per unit of time.
        scale: A in V(x) = A x^(1-gamma) / (1-gamma), or in A log x + c where gamma is 1.
        offset: c where gamma is 1; else 0.
    """

    risky_share: float
    consumption_rate: float
    growth: float
    scale: float
    offset: float = 0.0


class Merton(ControlProblem):
    """Merton's problem with constant relative risk aversion; states (B, 1) > 0, actions (B, 2) = (pi, k).

    Args:
        risk_free: r_f, per unit of time.
        mean_return: mu, of the risky asset, per unit of time.
        volatility: sigma > 0, of the risky asset.
        risk_aversion: gamma > 0; 1 is logarithmic utility.
        discount: rho > 0, per unit of time.

    Raises:
        ValueError: A parameter is out of range, or lifetime utility is infinite: rho <= (1-gamma) M.
    """

    state_dim = 1
    action_dim = 2
    noise_dim = 1

    def __init__(
        self,
        *,
        risk_free: float = 0.03,
        mean_return: float = 0.08,
        volatility: float = 0.2,
        risk_aversion: float = 2.0,
        discount: float = 0.05,
    ) -> None:
        for name, number in (("volatility", volatility), ("risk_aversion", risk_aversion), ("discount", discount)):
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        self.risk_free, self.mean_return, self.volatility = risk_free, mean_return, volatility
        self.risk_aversion, self.discount = risk_aversion, discount
        self._solution = self._solve()

    def _solve(self) -> MertonSolution:
        gamma, excess = self.risk_aversion, self.mean_return - self.risk_free
        growth = self.risk_free + excess**2 / (2 * gamma * self.volatility**2)
        margin = self.discount - (1 - gamma) * growth
        if margin <= 0:
            raise ValueError(
                "infeasible: lifetime utility is infinite unless rho > (1 - gamma) M, and here "
                f"rho = {self.discount:.6g}, (1 - gamma) M = {(1 - gamma) * growth:.6g} (gamma = {gamma:.6g}, "
                f"M = {growth:.6g}); raise the discount rate"
            )
        rate = margin / gamma
        share = excess / (gamma * self.volatility**2)
        offset = self._log_offset(share, rate) if gamma == 1 else 0.0
        return MertonSolution(
            risky_share=share, consumption_rate=rate, growth=growth, scale=rate**-gamma, offset=offset
        )

    def _growth(self, risky_share: float, consumption_rate: float) -> float:
        """G of constant controls, per unit of time."""
        growth = self.risk_free + risky_share * (self.mean_return - self.risk_free) - consumption_rate
        return growth - 0.5 * self.risk_aversion * (risky_share * self.volatility) ** 2

    def _log_offset(self, risky_share: float, consumption_rate: float) -> float:
        """The value of constant controls at wealth 1 and logarithmic utility."""
        growth = self._growth(risky_share, consumption_rate)
        return (math.log(consumption_rate) + growth / self.discount) / self.discount

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """[r_f + pi (mu - r_f) - k] x, (B, 1)."""
        return (self.risk_free + a[:, :1] * (self.mean_return - self.risk_free) - a[:, 1:]) * x

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """The product pi sigma x, (B, 1, 1)."""
        return (a[:, :1] * self.volatility * x).unsqueeze(-1)

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Utility of consumption, (B,); -inf, without a gradient, where k x <= 0, so parametrise k to be positive."""
        consumption = (a[:, 1:] * x).squeeze(-1)
        feasible = consumption > 0
        utility = self._utility(torch.where(feasible, consumption, 1.0))
        return torch.where(feasible, utility, -torch.inf)

    def _utility(self, amount: Tensor) -> Tensor:
        power = 1 - self.risk_aversion
        return amount.log() if power == 0 else amount**power / power

    def solution(self) -> MertonSolution:
        """The exact solution."""
        return self._solution

    def value(self, x: Tensor) -> Tensor:
        """V*(x), (B,), of wealth (B, 1) > 0."""
        return self._solution.scale * self._utility(x.squeeze(-1)) + self._solution.offset

    def optimal_action(self, x: Tensor) -> Tensor:
        """(pi*, k*), (B, 2), the same for every wealth."""
        return x.new_tensor([self._solution.risky_share, self._solution.consumption_rate]).expand(x.shape[0], -1)

    def policy_value(self, risky_share: float, consumption_rate: float) -> float:
        """The value of constant controls at wealth 1: A / (1-gamma), or c where gamma is 1.

        A = k^(1-gamma) / (rho - (1-gamma) G), with G and c as in the module's docstring.

        Args:
            risky_share: pi, any real number.
            consumption_rate: k > 0.

        Raises:
            ValueError: k is not positive, or the value is infinite: rho <= (1-gamma) G.
        """
        if not consumption_rate > 0:
            raise ValueError(f"consumption_rate must be positive, got {consumption_rate}")
        power, growth = 1 - self.risk_aversion, self._growth(risky_share, consumption_rate)
        if power == 0:
            return self._log_offset(risky_share, consumption_rate)
        margin = self.discount - power * growth
        if margin <= 0:
            raise ValueError(
                f"the policy pi = {risky_share:.6g}, k = {consumption_rate:.6g} has no finite value: that needs "
                f"rho > (1 - gamma) G, and here rho = {self.discount:.6g}, (1 - gamma) G = {power * growth:.6g}; "
                f"take controls closer to the optimum {self._solution}"
            )
        return consumption_rate**power / (margin * power)
