"""Methods that see transitions only, against the gain of the chain that they see and that of the diffusion."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.lqr import StochasticLQR, discretised_gain
from ddpo.control.solvers.lspi import AffinePolicy, extrapolate, lspi
from ddpo.control.solvers.networks import uniform_box
from ddpo.control.solvers.q_learning import (
    QLearningConfig,
    QLearningResult,
    advantage_rate_target,
    one_step_target,
    q_learning,
)
from ddpo.control.solvers.transitions import Transitions, sample_transitions

_STATES, _ACTIONS = uniform_box(-2.0, 2.0), uniform_box(-5.0, 5.0)


def transitions(dt: float, *, generator: torch.Generator, count: int = 1_000_000) -> Transitions:
    """Of the scalar regulator."""
    return sample_transitions(
        StochasticLQR.example(), count, states=_STATES, actions=_ACTIONS, dt=dt, generator=generator
    )


def extrapolated_gain(seed: int) -> float:
    """Least squares and Richardson from steps of .02 and .04, a million transitions each, with the same noise."""

    def draw(dt: float) -> Transitions:
        return transitions(dt, generator=torch.Generator().manual_seed(seed))

    return extrapolate(draw, 0.02, 0.1, AffinePolicy.zero(1, 1)).gain.item()


def learn(seed: int) -> QLearningResult:
    """Q-learning with small networks on the scalar regulator."""
    return q_learning(
        StochasticLQR.example(),
        states=_STATES,
        actions=_ACTIONS,
        config=QLearningConfig(),
        generator=torch.Generator().manual_seed(seed),
    )


def actor_error(result: QLearningResult) -> float:
    """Root mean square error of the actions on [-1.5, 1.5], relative to the optimal ones'."""
    x = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)[:, None]
    exact = StochasticLQR.example().optimal_action(x)
    return float(((result.policy(x) - exact).square().mean() / exact.square().mean()).sqrt())


def _spread(dt: float) -> tuple[float, float, float]:
    """Standard deviation over actions at x = 1 of Q, the mean advantage-rate target and the mean usual target."""
    problem = StochasticLQR.example()
    a = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    x = torch.ones_like(a)
    P = problem.solution().P.item()
    exact = (problem.reward(x, a) - P * x[:, 0] * problem.drift(x, a)[:, 0]) / problem.discount
    means: list[Tensor] = []
    for sign in (1.0, -1.0):
        following = x + problem.drift(x, a) * dt + sign * 0.3 * dt**0.5
        batch = Transitions(state=x, action=a, reward=problem.reward(x, a), next_state=following, dt=dt)
        value, later = problem.value(x), problem.value(following)
        means += [
            advantage_rate_target(batch, value, later, problem.discount),
            one_step_target(batch, later, problem.discount),
        ]
    return (
        float(exact.std()),
        float((0.5 * (means[0] + means[2])).std()),
        float((0.5 * (means[1] + means[3])).std()),
    )


def _targets() -> Iterator[Measurement]:
    dt = 1e-4
    exact, rate, usual = _spread(dt)
    yield Measurement(
        name="what actions change in the target, / Q's",
        exact=1.0,
        obtained=rate / exact,
        error=abs(rate / exact - 1),
        tolerance=1e-3,
    )
    share = usual / exact / (0.1 * dt)
    yield Measurement(
        name="the same of r dt + e^(-rho dt) V', / (rho dt)",
        exact=1.0,
        obtained=share,
        error=abs(share - 1),
        tolerance=1e-3,
    )


def _lspi() -> Iterator[Measurement]:
    rng = torch.Generator().manual_seed(0)
    exact = StochasticLQR.example().solution().K.item()
    chain = discretised_gain(-0.5, 1.0, 1.0, 0.1, 0.3, 0.1, 0.05).item()
    gain = lspi(transitions(0.05, generator=rng), 0.1, AffinePolicy.zero(1, 1)).policy.gain.item()
    yield Measurement(
        name="gain bias at dt .05",
        exact=chain / exact - 1,
        obtained=gain / exact - 1,
        error=abs(gain - chain) / exact,
        tolerance=5e-3,
    )
    gain = extrapolated_gain(0)
    yield Measurement(
        name="gain after Richardson, relative", exact=exact, obtained=gain, error=abs(gain / exact - 1), tolerance=5e-3
    )


def _q_learning() -> Iterator[Measurement]:
    error = actor_error(learn(0))
    yield Measurement(name="actions, relative", exact=0.0, obtained=error, error=error, tolerance=3e-2)


CHECKS: tuple[Check, ...] = (
    Check(
        name="advantage rate",
        group="model_free",
        claim="As dt -> 0 the advantage-rate target keeps Q's dependence on the action, the usual target rho dt of it.",
        level="fast",
        run=_targets,
    ),
    Check(
        name="LSPI",
        group="model_free",
        claim="Least-squares policy iteration has exactly the bias of its chain, which Richardson removes.",
        level="full",
        run=_lspi,
    ),
    Check(
        name="Q-learning",
        group="model_free",
        claim="Q-learning with networks finds the regulator's policy from transitions alone.",
        level="full",
        run=_q_learning,
    ),
)
