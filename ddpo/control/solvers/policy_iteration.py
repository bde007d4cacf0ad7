"""Policy iteration on the Hamilton-Jacobi-Bellman equation with neural networks.

    evaluate   rho V_k = r(x, alpha_k(x)) + L^alpha_k V_k            linear in V_k (`ddpo.control.solvers.evaluation`)
    improve    alpha_k+1(x) in argmax_a { r(x, a) + L^a V_k(x) }              (`ddpo.control.solvers.improvement`)

It is Newton's method for rho V = max_a { r + L^a V } (Howard 1960; Kleinman 1968 for regulators), so it converges
quadratically from any policy of finite value, and only from those. Where no such policy is known, larger discount rates
at the start, `discounts`, make the first one's value finite.

    problem, rng = StochasticLQR.example(), torch.Generator().manual_seed(0)
    result = policy_iteration(
        problem,
        QuadraticMLP(1, generator=rng),
        lambda x: torch.zeros_like(x),
        uniform_box(-2.0, 2.0),
        config=PolicyIterationConfig(),
        generator=rng,
    )
    result.policy(torch.tensor([[1.0]], dtype=torch.float64))        # -2.6598
    [record.hjb_residual for record in result.history]

A small residual is no certificate: it vanishes at every root of a Riccati equation. Each record of the history holds
what the value predicts from a batch of states next to what the policy earns from them, by simulation, which V does not
enter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ddpo.control.problems.problem import ControlProblem
from ddpo.control.solvers.evaluation import (
    RolloutConfig,
    begin_myopic,
    evaluate_collocation,
    evaluate_monte_carlo,
    evaluate_residual,
)
from ddpo.control.solvers.generator import Value, derivatives, hamiltonian
from ddpo.control.solvers.improvement import GreedyPolicy, improve_actor, snapshot
from ddpo.control.solvers.simulate import Estimate, Policy, Scheme, closed_loop_returns, estimate, require_finite_value

StateSampler = Callable[[int, torch.Generator], Tensor]
"""Draws states (B, n)."""


@dataclass(frozen=True, kw_only=True)
class PolicyIterationConfig:
    """How to evaluate and improve.

    Attributes:
        evaluate: How a policy is evaluated, see `ddpo.control.solvers.evaluation`.
        improve: `greedy` maximises the Hamiltonian at each state by Newton's method, in one step where it is quadratic;
            `actor` trains the policy network, which must then be a module.
        num_iterations: Evaluations, each followed by an improvement.
        num_points: States drawn for each evaluation and improvement.
        value_steps: Most L-BFGS steps of an evaluation.
        actor_steps: Most L-BFGS steps of an improvement by an actor.
        relative: Divides errors by |V|, for values that range over orders of magnitude and never vanish; V then
            begins as r / rho.
        rollouts: Paths of `monte_carlo` and `residual`.
        discounts: Discount rates of the first iterations in place of the problem's, falling towards it.
        closed_loop_every: Iterations between simulations of the policy; 0 for only after the last.
        closed_loop_paths: States that the simulation starts from, once each.
        closed_loop_dt: Its step; its errors are of order dt^2.
        closed_loop_horizon: Where it stops; 8 / rho unless given.
        closed_loop_scheme: Its scheme.
    """

    evaluate: Literal["monte_carlo", "residual", "collocation"] = "collocation"
    improve: Literal["greedy", "actor"] = "greedy"
    num_iterations: int = 8
    num_points: int = 256
    value_steps: int = 100
    actor_steps: int = 30
    relative: bool = False
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    discounts: tuple[float, ...] = ()
    closed_loop_every: int = 0
    closed_loop_paths: int = 256
    closed_loop_dt: float = 0.05
    closed_loop_horizon: float | None = None
    closed_loop_scheme: Scheme = "heun"

    def __post_init__(self) -> None:
        """Refuses what no run could use."""
        if self.evaluate not in ("monte_carlo", "residual", "collocation"):
            raise ValueError(f"evaluate must be 'monte_carlo', 'residual' or 'collocation', got {self.evaluate!r}")
        if self.improve not in ("greedy", "actor"):
            raise ValueError(f"improve must be 'greedy' or 'actor', got {self.improve!r}")
        if min(self.num_iterations, self.num_points, self.value_steps, self.actor_steps, self.closed_loop_paths) < 1:
            raise ValueError(f"counts must be at least 1, got {self}")
        if self.closed_loop_every < 0:
            raise ValueError(f"closed_loop_every must not be negative, got {self.closed_loop_every}")
        if len(self.discounts) >= self.num_iterations:
            raise ValueError(
                f"{len(self.discounts)} other discount rates leave none of the {self.num_iterations} iterations to the "
                "problem's own; raise num_iterations"
            )


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What one iteration came to.

    Attributes:
        discount: The rate it worked with.
        fit_error: Root mean square error of the evaluation; of the residual, per unit of time, under `collocation`.
        objective: Mean over states of Q = (r + L V) / rho under the improved policy.
        hjb_residual: Root mean square of rho V - r - L V under the improved policy, per unit of time.
        predicted: Mean of V over the states that the simulation starts from.
        achieved: What the improved policy earns from them; None where it was not simulated.
        shortfall: V less what it earns, path by path, so with a smaller standard error.
    """

    discount: float
    fit_error: float
    objective: float
    hjb_residual: float
    predicted: float
    achieved: Estimate | None
    shortfall: Estimate | None


@dataclass(frozen=True, kw_only=True)
class PolicyIterationResult:
    """Where policy iteration ended.

    Attributes:
        value: V, (B,), of states (B, n).
        policy: The improved policy, (B, m).
        history: One record for each iteration.
    """

    value: Value
    policy: Policy
    history: tuple[Iteration, ...]


def policy_iteration(
    problem: ControlProblem,
    value: nn.Module,
    policy: Policy,
    states: StateSampler,
    *,
    config: PolicyIterationConfig,
    generator: torch.Generator,
    on_iteration: Callable[[Iteration], None] | None = None,
) -> PolicyIterationResult:
    """Solves an infinite-horizon problem.

    Args:
        problem: The problem.
        value: Network for V, (B,) of (B, n), trained in place; float64 for `collocation`.
        policy: Where to start, of finite value; trained in place under `improve = "actor"`.
        states: Where equations are to hold.
        config: Method.
        generator: Source of states and noise.
        on_iteration: Called with each record, for progress.

    Raises:
        ValueError: The horizon is finite, an actor is not a module, collocation lacks float64, the first policy has no
            finite value, or the Hamiltonian has no maximum that `greedy` finds.
    """
    _check(problem, value, policy, config)
    probe = states(config.closed_loop_paths, generator)
    first = with_discount(problem, config.discounts[0]) if config.discounts else problem
    scheme, dt = config.closed_loop_scheme, config.closed_loop_dt
    require_finite_value(first, policy, probe, generator=generator, dt=dt, scheme=scheme)
    if config.relative:
        begin_myopic(first, value, policy, probe, max_steps=config.value_steps)
    start, history = policy, []
    for index in range(config.num_iterations):
        current = problem
        if index < len(config.discounts):
            current = with_discount(problem, config.discounts[index])
        x = states(config.num_points, generator)
        fit_error = _evaluate(current, value, policy, x, config, generator)
        at = derivatives(value, x)
        if config.improve == "actor":
            assert isinstance(policy, nn.Module)
            improve_actor(current, policy, x, at, max_steps=config.actor_steps, relative=config.relative)
        else:
            policy = GreedyPolicy(problem=current, value=snapshot(value), start=start)
        with torch.no_grad():
            heights, foretold = hamiltonian(current, x, policy(x), at.gradient, at.hessian), value(probe)
        achieved = shortfall = None
        last = index == config.num_iterations - 1
        if last or (config.closed_loop_every and (index + 1) % config.closed_loop_every == 0):
            earned = closed_loop_returns(
                current,
                policy,
                probe,
                dt=dt,
                generator=generator,
                horizon=config.closed_loop_horizon,
                scheme=scheme,
            )
            achieved, shortfall = estimate(earned), estimate(foretold - earned)
        record = Iteration(
            discount=current.discount,
            fit_error=fit_error,
            objective=float(heights.mean()) / current.discount,
            hjb_residual=float((current.discount * at.value - heights).square().mean().sqrt()),
            predicted=float(foretold.mean()),
            achieved=achieved,
            shortfall=shortfall,
        )
        history.append(record)
        if on_iteration is not None:
            on_iteration(record)
    return PolicyIterationResult(value=snapshot(value), policy=policy, history=tuple(history))


def with_discount(problem: ControlProblem, discount: float) -> ControlProblem:
    """The same problem at another discount rate.

    Raises:
        ValueError: The rate is not positive.
    """
    if not discount > 0:
        raise ValueError(f"a discount rate must be positive, got {discount}")
    return _Discounted(problem, discount)


class _Discounted(ControlProblem):
    """A problem at another discount rate."""

    def __init__(self, problem: ControlProblem, discount: float) -> None:
        self.problem, self.discount, self.horizon = problem, discount, problem.horizon
        self.state_dim, self.action_dim, self.noise_dim = problem.state_dim, problem.action_dim, problem.noise_dim

    def drift(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return self.problem.drift(x, a, t)

    def diffusion(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return self.problem.diffusion(x, a, t)

    def reward(self, x: Tensor, a: Tensor, t: Tensor | float = 0.0) -> Tensor:
        return self.problem.reward(x, a, t)

    def terminal_reward(self, x: Tensor) -> Tensor:
        return self.problem.terminal_reward(x)


def _evaluate(
    problem: ControlProblem,
    value: nn.Module,
    policy: Policy,
    x: Tensor,
    config: PolicyIterationConfig,
    generator: torch.Generator,
) -> float:
    steps, relative = config.value_steps, config.relative
    if config.evaluate == "collocation":
        return evaluate_collocation(problem, value, policy, x, max_steps=steps, relative=relative)
    evaluate = evaluate_monte_carlo if config.evaluate == "monte_carlo" else evaluate_residual
    return evaluate(
        problem,
        value,
        policy,
        x,
        rollouts=config.rollouts,
        max_steps=steps,
        relative=relative,
        generator=generator,
    )


def _check(problem: ControlProblem, value: nn.Module, policy: Policy, config: PolicyIterationConfig) -> None:
    if problem.horizon is not None:
        raise ValueError(f"policy iteration needs an infinite horizon, the problem's is {problem.horizon}")
    if config.improve == "actor" and not isinstance(policy, nn.Module):
        raise ValueError(
            "improve='actor' trains the policy: pass a module, such as ddpo.control.solvers.networks.Actor"
        )
    dtypes = {parameter.dtype for parameter in value.parameters()}
    if config.evaluate == "collocation" and dtypes != {torch.float64}:
        raise ValueError(f"collocation needs a value network in float64, got {sorted(map(str, dtypes))}")
