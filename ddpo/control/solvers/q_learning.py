"""Q-learning in continuous time, from sampled transitions alone.

    Q(x, a) = (r + L^a V) / rho,   V(x) = max_a Q(x, a)

The usual temporal-difference target r dt + e^(-rho dt) V(x') has the mean V + rho dt (Q - V): as dt -> 0 it forgets the
action, and a critic fitted to it has no greedy policy (Baird 1994; Tallec et al., arXiv:1901.09732). Its rate does not:

    y = V(x) + [r dt + e^(-rho dt) V(x') - V(x)] / (rho dt),    E y = Q + O(dt)     (Jia and Zhou, arXiv:2207.00713)

The noise of y has the size |Sigma' grad V| / (rho sqrt(dt)), while the bias is the Euler chain's, of order dt: small
steps trade the one for the other. Fitting V = max_a y itself would step V by 1 / rho, far beyond the fastest time
scale of the closed loop, and diverges; so with Q = V + q / rho each sweep

    draws transitions                       B of them, fresh
    fits    q(x, a) to rho (y - V)          the critic, an MLP of (x, a) with a quadratic skip connection
    climbs  q(x, alpha(x))                  the actor
    moves   V(x) by tau q(x, alpha(x))      the value, an MLP of x with a quadratic skip connection

which follows dV/ds = max_a { r + L^a V } - rho V in steps of tau. They fall as 1/k in the second half, whose critics
are averaged, so that noise averages out. Only what the actions compare is fast: the constant of V settles
over 1 / rho.

    rng = torch.Generator().manual_seed(0)
    result = q_learning(problem, states=uniform_box(-2.0, 2.0), actions=uniform_box(-5.0, 5.0),
                        config=QLearningConfig(), generator=rng)
    result.policy(x), result.history

B is the batch, n the state's and m the action's dimension.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpo.control.problems.problem import ControlProblem
from ddpo.control.solvers.fitting import minimise
from ddpo.control.solvers.generator import Value
from ddpo.control.solvers.improvement import snapshot
from ddpo.control.solvers.networks import Actor, QuadraticMLP
from ddpo.control.solvers.simulate import Policy
from ddpo.control.solvers.transitions import Sampler, Transitions, sample_transitions

_NUM_STATES = 4096
"""States that the actor and the value are fitted at, whose targets carry no noise of their own."""


@dataclass(frozen=True, kw_only=True)
class QLearningConfig:
    """How to learn.

    Attributes:
        dt: Step of the transitions.
        num_sweeps: Sweeps; the second half is averaged.
        batch_size: B, fresh transitions a sweep.
        tau: Step of the value in the first half, in units of time; below twice the closed loop's fastest time scale.
        fit_steps: Most L-BFGS steps of each of the three fits; few, as more would fit the targets' noise.
        width: Of the hidden layers.
    """

    dt: float = 0.005
    num_sweeps: int = 60
    batch_size: int = 100_000
    tau: float = 0.2
    fit_steps: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        """Refuses what no run could use."""
        if not (self.dt > 0 and self.tau > 0):
            raise ValueError(f"dt and tau must be positive, got {self.dt} and {self.tau}")
        if min(self.num_sweeps - 1, self.batch_size, self.fit_steps, self.width) < 1:
            raise ValueError(f"counts must be at least 1, and num_sweeps at least 2, got {self}")


@dataclass(frozen=True, kw_only=True)
class QLearningRecord:
    """What a sweep came to.

    Attributes:
        sweep: From 1.
        tau: The value's step.
        critic_error: Root mean square error of the fit of q, mostly the targets' noise, per unit of time.
        residual: Root mean square of q(x, alpha(x)), per unit of time; zero at the solution.
        objective: Mean of V over states.
    """

    sweep: int
    tau: float
    critic_error: float
    residual: float
    objective: float


@dataclass(frozen=True, kw_only=True)
class QLearningResult:
    """Where learning ended.

    Attributes:
        value: V, (B,), of states (B, n).
        critic: Q, (B,), of states (B, n) and actions (B, m), averaged over the second half.
        policy: The actor that climbed it, (B, m), of states (B, n).
        history: A record for each sweep.
    """

    value: Value
    critic: Callable[[Tensor, Tensor], Tensor]
    policy: Policy
    history: tuple[QLearningRecord, ...]


def advantage_rate_target(transitions: Transitions, value: Tensor, next_value: Tensor, discount: float) -> Tensor:
    """Y = V + [r dt + e^(-rho dt) V' - V] / (rho dt), (B,), of V and V' (B,) at the states and the next states."""
    dt = transitions.dt
    gained = transitions.reward * dt + math.exp(-discount * dt) * next_value - value
    return value + gained / (discount * dt)


def one_step_target(transitions: Transitions, next_value: Tensor, discount: float) -> Tensor:
    """The usual r dt + e^(-rho dt) V', (B,), for comparison: it does not determine Q as dt -> 0."""
    return transitions.reward * transitions.dt + math.exp(-discount * transitions.dt) * next_value


def q_learning(
    problem: ControlProblem,
    *,
    states: Sampler,
    actions: Sampler,
    config: QLearningConfig,
    generator: torch.Generator,
    transform: Callable[[Tensor], Tensor] | None = None,
    on_sweep: Callable[[QLearningRecord], None] | None = None,
) -> QLearningResult:
    """Learns Q and a policy from transitions of the problem, whose coefficients and their derivatives it does not see.

    Args:
        problem: Where transitions come from.
        states: Draws states.
        actions: Draws actions to try; they should reach beyond the optimal ones.
        config: Method.
        generator: Of weights, transitions and noise.
        transform: Turns the actor's outputs (B, m) into actions in their range; needed where q has no maximum.
        on_sweep: Called with each record, for progress.

    Raises:
        ValueError: The horizon is finite, or learning diverged.
    """
    if problem.horizon is not None:
        raise ValueError(f"Q-learning needs an infinite horizon, the problem's is {problem.horizon}")
    n, m, rho = problem.state_dim, problem.action_dim, problem.discount
    value = QuadraticMLP(n, generator=generator, width=config.width, depth=1)
    rate = QuadraticMLP(n + m, generator=generator, width=config.width, depth=1)
    actor = Actor(n, m, generator=generator, width=config.width, transform=transform)
    history, critics = [], []
    half = config.num_sweeps // 2
    for sweep in range(1, config.num_sweeps + 1):
        batch = sample_transitions(
            problem, config.batch_size, states=states, actions=actions, dt=config.dt, generator=generator
        )
        tau = config.tau * min(1.0, half / sweep)
        critic_error = _fit_rate(rate, value, batch, rho, config.fit_steps)
        x = batch.state[:_NUM_STATES]
        _climb([rate], actor, x, config.fit_steps)
        with torch.no_grad():
            gained = rate(_pair(x, actor(x)))
            moved = value(x) + tau * gained
        minimise(lambda: (value(x) - moved).square().mean(), value, max_steps=config.fit_steps)  # noqa: B023
        if sweep > half:
            critics.append(snapshot(rate))
        record = QLearningRecord(
            sweep=sweep,
            tau=tau,
            critic_error=critic_error,
            residual=float(gained.square().mean().sqrt()),
            objective=float(moved.mean()),
        )
        history.append(record)
        if on_sweep is not None:
            on_sweep(record)
    _climb(critics, actor, states(_NUM_STATES, generator), 4 * config.fit_steps)
    final = snapshot(value)
    return QLearningResult(
        value=final,
        critic=lambda x, a: final(x) + _mean(critics, _pair(x, a)) / rho,
        policy=snapshot(actor),
        history=tuple(history),
    )


def _fit_rate(rate: nn.Module, value: nn.Module, batch: Transitions, rho: float, max_steps: int) -> float:
    """Fits q to rho (y - V); returns the root mean square error."""
    with torch.no_grad():
        height, next_height = value(batch.state), value(batch.next_state)
        targets = rho * (advantage_rate_target(batch, height, next_height, rho) - height)
    inputs = _pair(batch.state, batch.action)
    return float(minimise(lambda: (rate(inputs) - targets).square().mean(), rate, max_steps=max_steps) ** 0.5)


def _climb(critics: list[nn.Module], actor: nn.Module, x: Tensor, max_steps: int) -> None:
    """Moves the actor up the mean of the critics."""
    minimise(lambda: -_mean(critics, _pair(x, actor(x))).mean(), actor, max_steps=max_steps)


def _mean(critics: list[nn.Module], inputs: Tensor) -> Tensor:
    return torch.stack([critic(inputs) for critic in critics]).mean(0)


def _pair(x: Tensor, a: Tensor) -> Tensor:
    return torch.cat([x, a], 1)
