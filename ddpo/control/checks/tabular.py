"""Dynamic programming against a hand-worked process, linear programming and the shaping theorem."""

from collections.abc import Iterator

import numpy as np
from scipy.optimize import linprog

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.problems.shaping import horizon_q_values, shaped, shaped_horizon
from ddpo.control.solvers.tabular import (
    TabularMDP,
    Values,
    policy_iteration,
    spaceship,
    value_iteration,
)

_NUM_PROCESSES = 10
_TOLERANCE = 1e-10


def _compared(name: str, exact: tuple[float, ...], obtained: Values, tolerance: float = 0.0) -> Measurement:
    """A vector against its exact value, in the largest difference."""
    return Measurement(
        name=name,
        exact=str(exact),
        obtained=str(tuple(obtained.tolist())),
        error=float(np.abs(obtained - np.array(exact)).max()),
        tolerance=tolerance,
    )


def _spaceship_values() -> Iterator[Measurement]:
    values = [step[:2] for step in value_iteration(spaceship()).values]
    yield _compared("v1", (2.0, 1.0), values[1])
    yield _compared("v2", (2.75, 1.75), values[2])
    ratios = np.array([np.abs(values[k] - [3.5, 2.5]).max() * 2**k for k in range(1, 20)])
    yield Measurement(
        name="error of sweep k times 2^k, k = 1..19",
        exact=3.0,
        obtained=float(ratios[-1]),
        error=float(np.abs(ratios - 3).max()),
        tolerance=0.0,
    )


def _spaceship_policies() -> Iterator[Measurement]:
    one_sweep, exact = policy_iteration(spaceship(), sweeps=1), policy_iteration(spaceship())
    yield _compared("one sweep, v1", (1.0, 1.0), one_sweep.values[0][:2])
    yield _compared("one sweep, v2", (2.5, 1.5), one_sweep.values[1][:2])
    yield _compared("v*", (3.5, 2.5), exact.values[-1][:2])
    names = tuple(spaceship().action_names[action] for action in exact.policies[-1][:2])
    wanted = ("Explore", "Conserve")
    yield Measurement(
        name="pi*", exact=", ".join(wanted), obtained=", ".join(names), error=float(names != wanted), tolerance=0.0
    )


def _random_process(rng: np.random.Generator) -> TabularMDP:
    """Eight states and three actions; probabilities are far above the 1e-9 below which HiGHS drops an entry."""
    return TabularMDP(transition=rng.dirichlet(np.ones(8), size=(8, 3)), reward=rng.normal(size=(8, 3)), discount=0.9)


def _by_linear_programming(mdp: TabularMDP) -> Values:
    """The least v with v >= r + gamma P v (d'Epenoux 1963)."""
    own = np.repeat(np.eye(mdp.num_states), mdp.num_actions, axis=0)
    bounds = mdp.discount * mdp.transition.reshape(-1, mdp.num_states) - own
    result = linprog(np.ones(mdp.num_states), A_ub=bounds, b_ub=-mdp.reward.ravel(), bounds=(None, None))
    return np.asarray(result.x, dtype=np.float64)


def _linear_programming() -> Iterator[Measurement]:
    rng = np.random.default_rng(0)
    processes = [_random_process(rng) for _ in range(_NUM_PROCESSES)]
    exact = [_by_linear_programming(mdp) for mdp in processes]
    results = {
        "policy iteration": [policy_iteration(mdp).values[-1] for mdp in processes],
        "value iteration": [value_iteration(mdp, tolerance=_TOLERANCE).values[-1] for mdp in processes],
        "in place": [value_iteration(mdp, order="in_place", tolerance=_TOLERANCE).values[-1] for mdp in processes],
        "prioritised": [
            value_iteration(mdp, order="prioritised", tolerance=_TOLERANCE).values[-1] for mdp in processes
        ],
    }
    for name, values in results.items():
        error = float(np.abs(np.array(values) - np.array(exact)).max())
        yield Measurement(name=name, exact=0.0, obtained=error, error=error, tolerance=1.01 * _TOLERANCE)


def _shaping() -> Iterator[Measurement]:
    rng = np.random.default_rng(0)
    changed, error = 0, 0.0
    for _ in range(_NUM_PROCESSES):
        mdp, potential = _random_process(rng), 10 * rng.normal(size=8)
        old, new = policy_iteration(mdp), policy_iteration(shaped(mdp, potential))
        changed += int((old.policies[-1] != new.policies[-1]).sum())
        error = max(error, float(np.abs(new.values[-1] - old.values[-1] + potential).max()))
    yield Measurement(name="actions changed", exact=0.0, obtained=changed, error=float(changed), tolerance=0.0)
    yield Measurement(name="v' against v - Phi", exact=0.0, obtained=error, error=error, tolerance=1e-9)


def _shaping_over_a_horizon() -> Iterator[Measurement]:
    """A potential that depends on time and is 0 at the end, as of a denoising chain; and one that is not."""
    rng = np.random.default_rng(0)
    changed, error, moved = 0, 0.0, 0
    for _ in range(_NUM_PROCESSES):
        transition = rng.dirichlet(np.ones(4), size=(4, 3))
        reward = rng.normal(size=(5, 4, 3))
        potential = np.concatenate([10 * rng.normal(size=(5, 4)), np.zeros((1, 4))])
        old = horizon_q_values(transition, reward)
        new = horizon_q_values(transition, shaped_horizon(transition, reward, potential))
        changed += int((old.argmax(2) != new.argmax(2)).sum())
        error = max(error, float(np.abs(new - old + potential[:-1, :, None]).max()))
        open_ended = reward.copy()
        open_ended[-1] += transition @ (10 * rng.normal(size=4))  # what a potential at the end would add
        moved += int((old.argmax(2) != horizon_q_values(transition, open_ended).argmax(2)).sum())
    yield Measurement(name="actions changed, 5 steps", exact=0.0, obtained=changed, error=float(changed), tolerance=0.0)
    yield Measurement(name="q' against q - Phi", exact=0.0, obtained=error, error=error, tolerance=1e-9)
    yield Measurement(name="actions changed by a potential at the end", exact="> 0", obtained=moved,
                      error=float(moved == 0), tolerance=0.0)  # fmt: skip


CHECKS: tuple[Check, ...] = (
    Check(
        name="spaceship values",
        group="tabular",
        claim="Value iteration on the spaceship takes the printed steps and halves its error each sweep.",
        level="fast",
        run=_spaceship_values,
    ),
    Check(
        name="spaceship policies",
        group="tabular",
        claim="One-sweep policy iteration has the policy after two iterations, exact evaluation the values as well.",
        level="fast",
        run=_spaceship_policies,
    ),
    Check(
        name="linear programming",
        group="tabular",
        claim="Policy iteration and value iteration in every order solve random processes as linear programming does.",
        level="fast",
        run=_linear_programming,
    ),
    Check(
        name="shaping",
        group="tabular",
        claim="Potential-based shaping changes no optimal action and lowers the value by the potential.",
        level="fast",
        run=_shaping,
    ),
    Check(
        name="shaping over a horizon",
        group="tabular",
        claim="A potential that depends on time and ends at 0, as on a denoising chain, changes no optimal action.",
        level="fast",
        run=_shaping_over_a_horizon,
    ),
)
