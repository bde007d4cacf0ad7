"""The 100-dimensional Hamilton-Jacobi-Bellman equation of DeepBSDE, whose value is a one-dimensional integral.

    du/dt + Laplace u - lambda |grad u|^2 = 0,    u(x, T) = g(x) = log((1 + |x|^2) / 2),    x in R^d

(Han, Jentzen and E 2018, arXiv:1707.02568, with d = 100, T = 1, lambda = 1). It is KL control of a Brownian
motion with sigma = sqrt(2) I, reward -g and alpha = 1 / lambda, so that

    u(0, 0) = -1/lambda log E exp(-lambda g(sqrt(2 T) Z)) = -1/lambda log E ((1 + 2 T S) / 2)^(-lambda),   S ~ chi^2_d

Three ways to it: the integral, exact; Feynman-Kac Monte Carlo; and the cost of a learned control, an upper bound.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import quad
from scipy.stats import chi2
from torch import Tensor, nn

from ddpo.control.diffusion.soft_value import SoftValue, soft_value
from ddpo.control.problems.soc_problems import SOCProblem


def exact_value(*, dim: int = 100, horizon: float = 1.0, temperature: float = 1.0) -> float:
    """u(0, 0) by adaptive quadrature over S, to 1e-10 relative.

    Args:
        dim: d >= 2.
        horizon: T.
        temperature: 1 / lambda > 0.

    Raises:
        ValueError: dim < 2 or temperature <= 0.
    """
    if dim < 2 or temperature <= 0:
        raise ValueError(f"dim {dim}, temperature {temperature}: give dim >= 2 and temperature > 0")

    def integrand(s: float) -> float:
        return float(np.exp(chi2.logpdf(s, dim) - math.log((1 + 2 * horizon * s) / 2) / temperature))

    low, high = chi2.ppf(1e-16, dim), chi2.isf(1e-16, dim)
    body, _ = quad(integrand, low, high, epsabs=0, epsrel=1e-12, limit=400)
    rest = quad(integrand, 0, low, epsabs=1e-18)[0] + quad(integrand, high, np.inf, epsabs=1e-18)[0]
    return -temperature * math.log(body + rest)


def terminal_cost(x: Tensor) -> Tensor:
    """g(x) = log((1 + |x|^2) / 2), (B,), of states (B, d)."""
    return torch.log((1 + x.square().sum(1)) / 2)


def monte_carlo_value(
    *, num_paths: int, generator: torch.Generator, dim: int = 100, horizon: float = 1.0, temperature: float = 1.0
) -> SoftValue:
    """u(0, 0) by Feynman-Kac: the soft value of -g, in one step, which is exact for a Brownian motion."""
    sigma = math.sqrt(2) * torch.eye(dim, dtype=torch.float64)
    return soft_value(
        torch.zeros(1, dim, dtype=torch.float64),
        lambda x, t: torch.zeros_like(x),
        sigma,
        lambda x: -terminal_cost(x),
        alpha=temperature,
        horizon=horizon,
        num_steps=1,
        num_paths=num_paths,
        generator=generator,
    )


@dataclass(frozen=True, kw_only=True)
class DeepBSDEProblem(SOCProblem):
    """The equation's control problem at lambda = 1: a Brownian motion steered to the origin.

    Attributes:
        dim: d.
    """

    dim: int = 100
    num_steps: int = 20

    @property
    def sigma(self) -> Tensor:  # type: ignore[override]
        """Root of 2 times I."""
        return math.sqrt(2) * torch.eye(self.dim, dtype=torch.float64)

    @property
    def start(self) -> Tensor:  # type: ignore[override]
        """The origin."""
        return torch.zeros(self.dim, dtype=torch.float64)

    def drift(self, x: Tensor) -> Tensor:
        """Zero."""
        return 0 * x

    def terminal_cost(self, x: Tensor) -> Tensor:
        """The cost g."""
        return terminal_cost(x)

    def optimal_control(self, x: Tensor, t: Tensor) -> Tensor:
        """-sigma grad u, by quadrature over the noncentral law of |X_T|^2, radial by symmetry.

        With phi = E 2 / (1 + |X_T|^2) and 1 / (1 + y) = int_0^inf exp(-z (1 + y)) dz, the Laplace transform of a
        noncentral chi square gives phi = int 2 e^(-z) (1 + 2 v z)^(-d/2) exp(-z |x|^2 / (1 + 2 v z)) dz with v = 2 (T
        - t), and u* = sigma grad phi / phi follows under the integral sign.
        """
        nodes, weights = np.polynomial.legendre.leggauss(200)
        log_points = torch.from_numpy(20 * nodes - 12)
        points, measure = log_points.exp(), torch.from_numpy(20 * weights) * log_points.exp()
        widened = 1 + 4 * (self.horizon - t) * points
        radius = x.square().sum(1)
        log_integrand = measure.log() - points - 0.5 * self.dim * widened.log() - radius[:, None] * points / widened
        mean_slope = (log_integrand.softmax(1) * (points / widened)).sum(1)
        return -2 * math.sqrt(2) * mean_slope[:, None] * x


class RadialControl(nn.Module):
    """u(x, t) = -x * net(|x|^2 / d, t): what the symmetry of the problem leaves.

    Args:
        width: Of the hidden layer.
        generator: Of the initial weights.
    """

    def __init__(self, *, generator: torch.Generator, width: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, width, dtype=torch.float64)
        self.out = nn.Linear(width, 1, dtype=torch.float64)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5, generator=generator)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """u, (B, d), of states (B, d) and times, a scalar or (B,)."""
        features = torch.stack([x.square().mean(1), t.expand(x.shape[0])], 1)
        factor: Tensor = self.out(torch.tanh(self.hidden(features)))
        return -x * factor


def control_cost(
    problem: SOCProblem,
    control: nn.Module,
    *,
    num_paths: int,
    generator: torch.Generator,
    num_steps: int | None = None,
) -> tuple[float, float]:
    """E [int |u|^2 / 2 + f dt + g(X_T)] of a control and its standard error, with Euler-Maruyama paths.

    The mean-zero int u . dW is added to every path: at the optimum the sum is the value itself on every path, as
    dV = -(|u*|^2 / 2 + f) dt - u* . dW.
    """
    steps = num_steps or problem.num_steps
    dt, x = problem.horizon / steps, problem.start.expand(num_paths, -1)
    cost = torch.zeros(num_paths, dtype=x.dtype)
    with torch.no_grad():
        for k in range(steps):
            u = control(x, torch.tensor(k * dt, dtype=x.dtype))
            noise = math.sqrt(dt) * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            cost += dt * (0.5 * u.square().sum(1) + problem.running_cost(x)) + (u * noise).sum(1)
            x = x + problem.drift(x) * dt + (u * dt + noise) @ problem.sigma.T
        cost += problem.terminal_cost(x)
    return float(cost.mean()), float(cost.std() / math.sqrt(num_paths))
