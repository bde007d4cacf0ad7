"""Stochastic control problems of the literature with exact optimal controls, and the error of any control.

    dX = (b(X, t) + sigma u) dt + sigma dW,  X_0 = x_0,    minimise E [ int_0^T (|u|^2 / 2 + f(X)) dt + g(X_T) ]

From Domingo-Enrich et al. (SOC matching, arXiv:2312.02027), with the constants of the authors' published
experiments; T = 1 and the noise level lambda = 1 throughout:

| problem | d | b | f | g | sigma | x_0 | steps |
|---|---|---|---|---|---|---|---|
| quadratic OU, easy | 20 | .2 x | .2 x'x | .1 x'x | I | .5 N(0, I) | 50 |
| quadratic OU, hard | 20 | x | x'x | .5 x'x | I | .5 N(0, I) | 50 |
| linear OU | 10 | (-I + xi) x | 0 | sum of x | I + xi, xi ~ .1 N(0, 1) | 0 | 100 |
| double well | 10 | -grad of sum kappa (x^2 - 1)^2 | 0 | sum of nu (x^2 - 1)^2 | I | 0 | 200 |

with kappa = 5, nu = 3 in the first three coordinates of the double well and 1 in the others. x_0 and xi are random
there and are drawn from the caller's generator here. The optimal controls are exact: a Riccati equation through the
exponential of its Hamiltonian matrix, the exponential of A', and, as the double well is separable, one
finite-difference solution per kind of coordinate.

B states, d = n = w dimensions. Everything is float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddpo.control.problems.double_well import DoubleWell as ScalarDoubleWell
from ddpo.control.problems.double_well import DoubleWellReference, solve_double_well

Control = Callable[[Tensor, Tensor], Tensor]
"""u(x, t), (B, d), of states (B, d) and times, a scalar tensor or (B,)."""


class SOCProblem(ABC):
    """A control problem with quadratic control cost; all functions are differentiable in x.

    Attributes:
        start: x_0, (d,).
        sigma: (d, d), invertible.
        horizon: T.
        num_steps: Time steps that its authors use.
    """

    start: Tensor
    sigma: Tensor
    horizon: float = 1.0
    num_steps: int

    @abstractmethod
    def drift(self, x: Tensor) -> Tensor:
        """b(x), (B, d)."""

    @abstractmethod
    def terminal_cost(self, x: Tensor) -> Tensor:
        """g(x), (B,)."""

    def running_cost(self, x: Tensor) -> Tensor:
        """f(x), (B,); zero unless a problem says otherwise."""
        return 0 * x.sum(1)

    @abstractmethod
    def optimal_control(self, x: Tensor, t: Tensor) -> Tensor:
        """u*(x, t), (B, d), at a scalar time."""


@dataclass(frozen=True, kw_only=True)
class QuadraticOU(SOCProblem):
    """b = A x, f = x'P x, g = x'Q x; u* = -2 sigma' F(t) x.

    -F' = A'F + F A - 2 F sigma sigma' F + P with F(T) = Q; its solution is Y X^(-1) where (X, Y) solves a linear
    equation with the Hamiltonian matrix [[A, -2 sigma sigma'], [-P, -A']] from (I, Q) at T.

    Attributes:
        A: (d, d).
        P: (d, d), symmetric, not negative.
        Q: (d, d), symmetric, not negative.
        sigma: (d, d).
        start: (d,).
    """

    A: Tensor
    P: Tensor
    Q: Tensor
    sigma: Tensor
    start: Tensor
    num_steps: int = 50

    def drift(self, x: Tensor) -> Tensor:
        """A x."""
        return x @ self.A.T

    def running_cost(self, x: Tensor) -> Tensor:
        """The form x'P x."""
        return (x @ self.P * x).sum(1)

    def terminal_cost(self, x: Tensor) -> Tensor:
        """The form x'Q x."""
        return (x @ self.Q * x).sum(1)

    def riccati(self, t: Tensor) -> Tensor:
        """F(t), (d, d); the value is x'F(t) x + int_t^T tr(sigma' F sigma)."""
        d = self.A.shape[0]
        top = torch.cat([self.A, -2 * self.sigma @ self.sigma.T], 1)
        hamiltonian = torch.cat([top, torch.cat([-self.P, -self.A.T], 1)], 0)
        end = torch.cat([torch.eye(d, dtype=self.A.dtype), self.Q], 0)
        pair = torch.linalg.matrix_exp(hamiltonian * (t - self.horizon)) @ end
        return torch.linalg.solve(pair[:d], pair[d:], left=False)

    def optimal_control(self, x: Tensor, t: Tensor) -> Tensor:
        """-2 sigma' F(t) x."""
        return -2 * x @ self.riccati(t) @ self.sigma


@dataclass(frozen=True, kw_only=True)
class LinearOU(SOCProblem):
    """b = A x, f = 0, g = omega'x; u* = -sigma' exp(A'(T - t)) omega, the same at every x.

    Attributes:
        A: (d, d).
        omega: (d,).
        sigma: (d, d).
        start: (d,).
    """

    A: Tensor
    omega: Tensor
    sigma: Tensor
    start: Tensor
    num_steps: int = 100

    def drift(self, x: Tensor) -> Tensor:
        """A x."""
        return x @ self.A.T

    def terminal_cost(self, x: Tensor) -> Tensor:
        """The inner product omega'x."""
        return x @ self.omega

    def optimal_control(self, x: Tensor, t: Tensor) -> Tensor:
        """-sigma' exp(A'(T - t)) omega."""
        slope = torch.linalg.matrix_exp(self.A.T * (self.horizon - t)) @ self.omega
        return (-self.sigma.T @ slope).expand(x.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class DoubleWell(SOCProblem):
    """b_i = -4 kappa_i x_i (x_i^2 - 1), f = 0, g = sum_i nu_i (x_i^2 - 1)^2, sigma = I: 2^d wells, d scalar problems.

    Attributes:
        kappa: Heights of the barriers, (d,), positive.
        nu: Weights of the terminal cost, (d,), positive.
        half_width: The reference covers |x_i| <= half_width.
    """

    kappa: Tensor
    nu: Tensor
    half_width: float = 2.5
    num_steps: int = 200

    @property
    def sigma(self) -> Tensor:  # type: ignore[override]
        """I."""
        return torch.eye(len(self.kappa), dtype=torch.float64)

    @property
    def start(self) -> Tensor:  # type: ignore[override]
        """On top of every barrier."""
        return torch.zeros(len(self.kappa), dtype=torch.float64)

    def drift(self, x: Tensor) -> Tensor:
        """Down the walls of the wells."""
        return -4 * self.kappa * x * (x**2 - 1)

    def terminal_cost(self, x: Tensor) -> Tensor:
        """sum_i nu_i (x_i^2 - 1)^2."""
        return ((x**2 - 1) ** 2) @ self.nu

    @cached_property
    def references(self) -> dict[tuple[float, float], DoubleWellReference]:
        """The solution for every (kappa, nu) that occurs."""
        return {
            (kappa, nu): solve_double_well(
                ScalarDoubleWell(
                    lambda x, nu=nu: -nu * (x.squeeze(-1) ** 2 - 1) ** 2,  # type: ignore[misc]
                    barrier=kappa,
                    temperature=1.0,
                    horizon=self.horizon,
                ),
                half_width=self.half_width,
            )
            for kappa, nu in set(zip(self.kappa.tolist(), self.nu.tolist(), strict=True))
        }

    def optimal_control(self, x: Tensor, t: Tensor) -> Tensor:
        """One scalar control per coordinate.

        Raises:
            ValueError: A coordinate is outside the reference's grid.
        """
        control = torch.empty_like(x)
        for (kappa, nu), reference in self.references.items():
            columns = (self.kappa == kappa) & (self.nu == nu)
            states = x[:, columns]
            control[:, columns] = reference.optimal_action(t, states.reshape(-1, 1)).reshape(states.shape)
        return control


def quadratic_ou_easy(generator: torch.Generator, dim: int = 20) -> QuadraticOU:
    """The easy quadratic problem: .2, .2, .1; the starting point drawn from `generator`."""
    return _quadratic_ou(0.2, 0.2, 0.1, generator, dim)


def quadratic_ou_hard(generator: torch.Generator, dim: int = 20) -> QuadraticOU:
    """The hard quadratic problem, 1, 1, .5: unstable, with large costs."""
    return _quadratic_ou(1.0, 1.0, 0.5, generator, dim)


def _quadratic_ou(a: float, p: float, q: float, generator: torch.Generator, dim: int) -> QuadraticOU:
    eye = torch.eye(dim, dtype=torch.float64)
    start = 0.5 * torch.randn(dim, dtype=torch.float64, generator=generator)
    return QuadraticOU(A=a * eye, P=p * eye, Q=q * eye, sigma=eye, start=start)


def linear_ou(generator: torch.Generator, dim: int = 10) -> LinearOU:
    """The linear problem; the same random xi in A and sigma, as published."""
    eye, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    xi = 0.1 * torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    return LinearOU(A=xi - eye, omega=zero + 1, sigma=xi + eye, start=zero)


def double_well(dim: int = 10, num_steep: int = 3) -> DoubleWell:
    """The double well: kappa = 5, nu = 3 in `num_steep` coordinates, 1 in the others."""
    steep = torch.arange(dim) < num_steep
    one = torch.ones(dim, dtype=torch.float64)
    return DoubleWell(kappa=torch.where(steep, 5 * one, one), nu=torch.where(steep, 3 * one, one))


@dataclass(frozen=True, kw_only=True)
class ControlError:
    """How far a control is from the optimum, along the optimum's own paths.

    Attributes:
        squared: E int |u - u*|^2 dt.
        standard_error: Of squared.
        optimal: E int |u*|^2 dt.
    """

    squared: float
    standard_error: float
    optimal: float

    @property
    def relative(self) -> float:
        """Missed over optimal, `squared / optimal`."""
        return self.squared / self.optimal


def control_error(
    problem: SOCProblem,
    control: Control,
    *,
    num_paths: int,
    generator: torch.Generator,
    num_steps: int | None = None,
) -> ControlError:
    """Compares a control with u* along Euler-Maruyama paths of u*; the problem's own number of steps by default."""
    steps = num_steps or problem.num_steps
    dt, x = problem.horizon / steps, problem.start.expand(num_paths, -1)
    missed, optimal = torch.zeros(num_paths, dtype=x.dtype), torch.zeros(num_paths, dtype=x.dtype)
    with torch.no_grad():
        for k in range(steps):
            t = torch.tensor(k * dt, dtype=x.dtype)
            best = problem.optimal_control(x, t)
            missed += dt * (control(x, t) - best).square().sum(1)
            optimal += dt * best.square().sum(1)
            noise = math.sqrt(dt) * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            x = x + problem.drift(x) * dt + (best * dt + noise) @ problem.sigma.T
    return ControlError(
        squared=float(missed.mean()),
        standard_error=float(missed.std() / math.sqrt(num_paths)),
        optimal=float(optimal.mean()),
    )
