"""The time-dependent discounted problem over an infinite horizon: a regulator with periodic coefficients."""

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.linalg import schur

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.lqr import Matrix, solve_are
from ddpo.control.problems.periodic_lqr import PeriodicLQR

PERIOD, DISCOUNT = 1.0, 0.2


def wave(t: float, turns: int = 1) -> tuple[float, float]:
    """Cosine and sine of so many turns a period."""
    return math.cos(2 * math.pi * turns * t / PERIOD), math.sin(2 * math.pi * turns * t / PERIOD)


def drift(t: float) -> Matrix:
    """A: an oscillator that is driven apart."""
    cosine, sine = wave(t)
    return np.array([[0.3 * sine, 1.0], [-1.0, 0.2 + 0.5 * cosine]])


def push(t: float) -> Matrix:
    """B: the action reaches the second state, in some phases harder."""
    return np.array([[0.0], [1.0 + 0.5 * wave(t)[1]]])


def state_cost(t: float) -> Matrix:
    """Q."""
    return np.diag([1.0 + 0.5 * wave(t)[0], 0.3])


def action_cost(t: float) -> Matrix:
    """R."""
    return np.array([[0.4 + 0.2 * wave(t, 2)[0]]])


def noise(t: float) -> Matrix:
    """D."""
    return np.array([[0.2, 0.0], [0.1, 0.3 + 0.15 * wave(t)[1]]])


@cache
def example() -> PeriodicLQR:
    """The regulator with all of these."""
    return PeriodicLQR(drift, push, state_cost, action_cost, noise, period=PERIOD, discount=DISCOUNT)


def hamiltonian_root() -> Matrix:
    """P(0) from the contracting subspace of the Hamiltonian flow over one period, without a Riccati equation."""

    def rate(t: float, flow: NDArray[np.float64]) -> NDArray[np.float64]:
        shifted = drift(t) - 0.5 * DISCOUNT * np.eye(2)
        pushed = push(t) @ np.linalg.solve(action_cost(t), push(t).T)
        both = np.block([[shifted, -pushed], [-state_cost(t), -shifted.T]])
        return (both @ flow.reshape(4, 4)).ravel()

    flow = solve_ivp(rate, (0, PERIOD), np.eye(4).ravel(), method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    _, basis, count = schur(flow.reshape(4, 4), output="real", sort="iuc")
    assert count == 2
    root: Matrix = basis[2:, :2] @ np.linalg.inv(basis[:2, :2])
    return root


def closed_loop_cost(problem: PeriodicLQR, start: NDArray[np.float64], *, periods: int = 60) -> float:
    """E int e^(-rho t) -r dt of the optimal policy from a state at time 0, by its second moments."""

    def rate(t: float, state: NDArray[np.float64]) -> NDArray[np.float64]:
        moment, phase = state[:4].reshape(2, 2), t % PERIOD
        K = problem.gain(phase)
        loop = drift(phase) - push(phase) @ K
        spread = loop @ moment + moment @ loop.T + noise(phase) @ noise(phase).T
        price = state_cost(phase) + K.T @ action_cost(phase) @ K
        return np.append(spread.ravel(), 0.5 * math.exp(-DISCOUNT * t) * np.trace(price @ moment))

    path = solve_ivp(rate, (0, periods * PERIOD), np.append(np.outer(start, start).ravel(), 0.0), rtol=1e-7, atol=1e-9)
    return float(path.y[-1, -1])


def check_solution() -> Iterator[Measurement]:
    """P and c by routes that share no equation with the solver."""
    problem = example()
    P, _ = problem.coefficients(0.0)
    error = float(np.abs(P - hamiltonian_root()).max())
    yield Measurement(name="P(0), largest error", exact="Hamiltonian flow's subspace", obtained="periodic Riccati",
                      error=error, tolerance=1e-8)  # fmt: skip
    start = np.array([0.8, -0.5])
    obtained = -float(problem.value(0.0, torch.from_numpy(start)[None]))
    exact = closed_loop_cost(problem, start)
    yield Measurement(name="cost from (.8, -.5), by moments", exact=exact, obtained=obtained,
                      error=abs(obtained / exact - 1), tolerance=1e-4)  # fmt: skip


def check_hjb() -> Iterator[Measurement]:
    """The equation with dV/dt: with the derivative it holds, without it does not."""
    problem, step = example(), 1e-4
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    worst, without = 0.0, 0.0
    for t in (0.1, 0.35, 0.8):
        P, c = problem.coefficients(t)
        action = problem.optimal_action(t, x)
        gradient = -x @ torch.from_numpy(P)
        D = torch.from_numpy(noise(t))
        generator = (gradient * problem.drift(x, action, t)).sum(1) - 0.5 * torch.trace(D.T @ torch.from_numpy(P) @ D)
        slope = (problem.value(t + step, x) - problem.value(t - step, x)) / (2 * step)
        static = DISCOUNT * problem.value(t, x) - problem.reward(x, action, t) - generator
        worst = max(worst, float((static - slope).abs().max()))
        without = max(without, float(static.abs().max()))
    yield Measurement(name="largest residual", exact=0.0, obtained=worst, error=worst, tolerance=1e-6)
    yield Measurement(name="without dV/dt", exact="> 0.1", obtained=without, error=max(0.1 - without, 0.0),
                      tolerance=0.0)  # fmt: skip


def check_constant() -> Iterator[Measurement]:
    """Coefficients that stand still give the autonomous regulator's solution, whatever the period."""
    A, B, Q, R, D = drift(0.3), push(0.3), state_cost(0.3), action_cost(0.3), noise(0.3)
    exact = solve_are(A, B, Q, R, D, DISCOUNT)
    P, c = PeriodicLQR(A, B, Q, R, D, period=0.7, discount=DISCOUNT).coefficients(0.45)
    error = max(float(np.abs(P - exact.P).max()), abs(c - exact.c))
    yield Measurement(name="P and c against the algebraic equation", exact=exact.c, obtained=c, error=error,
                      tolerance=1e-8)  # fmt: skip


CHECKS = (
    Check(name="periodic", group="lqr", level="fast", run=check_solution,
          claim="With periodic coefficients the discounted problem has a periodic value, and the solver finds it."),
    Check(name="periodic HJB", group="lqr", level="fast", run=check_hjb,
          claim="It solves the time-dependent HJB equation, which without dV/dt does not hold."),
    Check(name="periodic, constant", group="lqr", level="fast", run=check_constant,
          claim="Where nothing depends on time it is the autonomous solution."),
)  # fmt: skip
