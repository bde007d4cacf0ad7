"""Policy evaluation: fitting a network to the value of a policy alpha.

    rho V = r(x, alpha(x)) + L^alpha V                                                    linear in V

    monte_carlo   regress on y = int_0^T e^(-rho s) r ds + e^(-rho T) V(X_T), V before the fit    (Feynman-Kac)
    residual      regress on y = V(x) + int_0^T e^(-rho s) [r + L^alpha V - rho V](X_s) ds        (Dynkin's formula)
    collocation   minimise the mean square of rho V - r - L^alpha V over states

The first two targets have the same mean. That of Monte Carlo carries the error of the step dt and the noise of the
paths into the value; that of the residual form multiplies both by the residual, which vanishes at the solution, at the
price of L V along the paths. Collocation needs neither paths nor an initial value, only the model's derivatives; among
the solutions on a bounded domain without boundary data, the network's smoothness picks the value, so a domain should
reach beyond where paths spend their time.

The Euler scheme's error is exact for a scalar regulator a = -K x with l = K beta - alpha: its chain has
P = (q + K^2 r_a) dt / (1 - e^(-rho dt) (1 - l dt)^2), above the continuous P = (q + K^2 r_a) / (rho + 2 l) by about
l^2 dt / (2 l + rho). For the standard example at dt = .05 that is 9% at the optimal gain, and greedy improvement in
continuous time comes to rest 10.2% above it. (The chain's own optimum is 7.8% below, another quantity.)

B is the batch, K the number of steps, n the state's dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpo.control.problems.problem import ControlProblem
from ddpo.control.solvers.fitting import minimise
from ddpo.control.solvers.generator import generator
from ddpo.control.solvers.simulate import Paths, Policy, Scheme, integrate, simulate


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Paths that targets are averaged over.

    Attributes:
        dt: Step, in units of time.
        horizon: T, where the current value takes over.
        scheme: See `ddpo.control.solvers.simulate`.
        num_paths: From each state; antithetic pairs where even.
    """

    dt: float = 0.05
    horizon: float = 2.0
    scheme: Scheme = "heun"
    num_paths: int = 8

    def __post_init__(self) -> None:
        """Refuses steps and horizons that leave no path."""
        if not 0 < self.dt <= self.horizon or self.num_paths < 1:
            raise ValueError(
                f"0 < dt <= horizon and num_paths >= 1 are needed, got {self.dt}, {self.horizon} and {self.num_paths}"
            )


def begin_myopic(problem: ControlProblem, value: nn.Module, policy: Policy, x: Tensor, *, max_steps: int) -> None:
    """Fits the value, in logarithms, to r(x, alpha(x)) / rho, what the policy would earn if states (B, n) stood still.

    For values of one sign that range over orders of magnitude, whose fit from elsewhere has no useful slope.

    Raises:
        ValueError: The reward and the value at its start differ in sign, or vanish.
    """
    with torch.no_grad():
        targets = problem.reward(x, policy(x)) / problem.discount
        if not bool((targets * value(x) > 0).all()):
            raise ValueError(
                "a relative fit needs a value network with the sign of the reward, everywhere; see PowerMLP"
            )

    def loss() -> Tensor:
        return (value(x) / targets).log().square().mean()

    minimise(loss, value, max_steps=max_steps)


def evaluate_monte_carlo(
    problem: ControlProblem,
    value: nn.Module,
    policy: Policy,
    x: Tensor,
    *,
    rollouts: RolloutConfig,
    max_steps: int,
    relative: bool,
    generator: torch.Generator,
) -> float:
    """Fits the value at states (B, n) to discounted rewards, bootstrapped after the horizon.

    Args:
        problem: The problem.
        value: V, trained in place.
        policy: alpha.
        x: Where paths start.
        rollouts: The paths.
        max_steps: Of L-BFGS.
        relative: Divides errors by |V| before the fit.
        generator: Source of the noise.

    Returns:
        The root mean square error of the fit.
    """
    paths = _paths(problem, policy, x, rollouts, generator)
    with torch.no_grad():
        tail = torch.exp(-problem.discount * paths.times[-1]) * value(paths.states[-1])
        targets = (paths.cumulative[-1] + tail).view(rollouts.num_paths, -1).mean(0)
    return _regress(value, x, targets, max_steps=max_steps, relative=relative)


def evaluate_residual(
    problem: ControlProblem,
    value: nn.Module,
    policy: Policy,
    x: Tensor,
    *,
    rollouts: RolloutConfig,
    max_steps: int,
    relative: bool,
    generator: torch.Generator,
) -> float:
    """Fits the value at states (B, n) to itself plus its discounted residual along paths.

    Arguments and result are those of `evaluate_monte_carlo`.
    """
    paths = _paths(problem, policy, x, rollouts, generator)
    visited, actions = paths.states.flatten(0, 1), paths.actions.flatten(0, 1)
    residual = _residual(problem, value, visited, actions).detach().view(paths.rewards.shape)
    correction = integrate(residual, paths.times, problem.discount)[-1].view(rollouts.num_paths, -1).mean(0)
    with torch.no_grad():
        targets = value(x) + correction
    return _regress(value, x, targets, max_steps=max_steps, relative=relative)


def evaluate_collocation(
    problem: ControlProblem, value: nn.Module, policy: Policy, x: Tensor, *, max_steps: int, relative: bool
) -> float:
    """Solves the linear equation of the policy's value at states (B, n) in the least-squares sense.

    Needs float64: the loss is squared, and second derivatives enter it.

    Args:
        problem: The problem.
        value: V, trained in place.
        policy: alpha.
        x: Collocation points.
        max_steps: Of L-BFGS.
        relative: Divides residuals by |V| before the fit.

    Returns:
        The root mean square residual after the fit, per unit of time.
    """
    actions = policy(x).detach()
    weight = _weight(value, x, relative=relative)

    def loss() -> Tensor:
        return (weight * _residual(problem, value, x, actions)).square().mean()

    return float(minimise(loss, value, max_steps=max_steps) ** 0.5)


def _residual(problem: ControlProblem, value: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """The residual r + L^a V - rho V, (B,)."""
    return problem.reward(x, a) + generator(value, problem, x, a) - problem.discount * value(x)


def _paths(
    problem: ControlProblem, policy: Policy, x: Tensor, rollouts: RolloutConfig, generator: torch.Generator
) -> Paths:
    """Paths of all states, `num_paths` of each, the copy's index slowest."""
    starts = x.repeat(rollouts.num_paths, 1)
    return simulate(
        problem,
        policy,
        starts,
        dt=rollouts.dt,
        num_steps=max(1, round(rollouts.horizon / rollouts.dt)),
        generator=generator,
        scheme=rollouts.scheme,
        antithetic=rollouts.num_paths % 2 == 0,
    )


def _regress(value: nn.Module, x: Tensor, targets: Tensor, *, max_steps: int, relative: bool) -> float:
    # Weights that depend on the noise of the targets would bias the fit; those of the old value do not.
    weight = _weight(value, x, relative=relative)

    def loss() -> Tensor:
        return (weight * (value(x) - targets)).square().mean()

    return float(minimise(loss, value, max_steps=max_steps) ** 0.5)


def _weight(value: nn.Module, x: Tensor, *, relative: bool) -> Tensor:
    with torch.no_grad():
        return 1 / value(x).abs() if relative else torch.ones_like(x[:, 0])
