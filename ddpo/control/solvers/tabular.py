"""Finite Markov decision processes, solved exactly.

    v_pi(s) = sum_a pi(a|s) [ r(s, a) + gamma sum_s' p(s'|s, a) v_pi(s') ]                         Bellman expectation
    v*(s) = max_a q*(s, a),    q*(s, a) = r(s, a) + gamma sum_s' p(s'|s, a) v*(s')                  Bellman optimality

Policy iteration solves the first exactly and acts greedily (Howard 1960); with a fixed number of sweeps instead it is
modified policy iteration (Puterman and Shin 1978), whose policy may be optimal long before its values are. Value
iteration applies the second over and over (Bellman 1957): in whole sweeps, in place, or where it changes most (Moore
and Atkeson 1993).

S states, A actions. Policies are (S,) action indices, or (S, A) probabilities where that is said. Of actions that are
equally good to 1e-12 of the largest value, the one with the lowest index is taken.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpo.control.problems.mdp import Policy, TabularMDP, proper_policy, require_proper, spaceship

__all__ = [
    "PolicyIterationTrace",
    "TabularMDP",
    "ValueIterationTrace",
    "greedy_policy",
    "policy_evaluation",
    "policy_iteration",
    "proper_policy",
    "q_values",
    "spaceship",
    "value_iteration",
]

Values = NDArray[np.float64]
BackupOrder = Literal["synchronous", "in_place", "prioritised"]

_TIE = 1e-12


@dataclass(frozen=True, kw_only=True)
class PolicyIterationTrace:
    """What policy iteration went through.

    Attributes:
        policies: K + 1 policies (S,): the initial one, then each improvement.
        values: K values (S,); values[k] evaluates policies[k], exactly or by a number of sweeps.
        converged: Whether it stopped because it was done, not because it ran out of iterations.
    """

    policies: tuple[Policy, ...]
    values: tuple[Values, ...]
    converged: bool


@dataclass(frozen=True, kw_only=True)
class ValueIterationTrace:
    """What value iteration went through.

    Attributes:
        values: The initial values and those after every S backups, (S,) each.
        converged: Whether the tolerance was reached.
    """

    values: tuple[Values, ...]
    converged: bool


def q_values(mdp: TabularMDP, values: ArrayLike) -> Values:
    """The value of each action followed by the given values, (S, A)."""
    return mdp.reward + mdp.discount * mdp.transition @ _start(mdp, values)


def greedy_policy(mdp: TabularMDP, values: ArrayLike) -> Policy:
    """The best action in each state given the values that follow, (S,); ties go to the lowest index."""
    q = q_values(mdp, values)
    return np.argmax(q >= q.max(-1, keepdims=True) - _TIE * max(1.0, float(np.abs(q).max())), axis=-1)


def policy_evaluation(
    mdp: TabularMDP, policy: ArrayLike, *, sweeps: int | None = None, initial_values: ArrayLike | None = None
) -> Values:
    """The values of a policy, (S,), by one linear solve or by a number of synchronous sweeps.

    Args:
        mdp: The process.
        policy: Actions (S,) or probabilities (S, A).
        sweeps: At least 1, or None to solve exactly.
        initial_values: Where the sweeps start, (S,); zeros if left out.

    Raises:
        ValueError: The policy is ill-formed, or the discount is 1 and under this policy some state never ends.
    """
    probabilities = _probabilities(mdp, policy)
    transition = np.einsum("sa,sat->st", probabilities, mdp.transition)
    reward = (probabilities * mdp.reward).sum(-1)
    if sweeps is not None:
        values = _start(mdp, initial_values)
        for _ in range(_at_least_one("sweeps", sweeps)):
            values = reward + mdp.discount * transition @ values
        return values
    free = ~mdp.terminal
    if mdp.discount == 1:
        require_proper(mdp, transition)
    values = np.zeros(mdp.num_states)
    within = transition[np.ix_(free, free)]
    values[free] = np.linalg.solve(np.eye(len(within)) - mdp.discount * within, reward[free])
    return values


def policy_iteration(
    mdp: TabularMDP,
    *,
    initial_policy: ArrayLike | None = None,
    initial_values: ArrayLike | None = None,
    sweeps: int | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
) -> PolicyIterationTrace:
    """Evaluates and improves a policy in turn.

    With exact evaluation it is done when the policy repeats, which is then optimal. With sweeps it is done when the
    Bellman residual bounds the values' error by the tolerance, as in `value_iteration`; a repeated policy proves
    nothing there.

    Args:
        mdp: The process.
        initial_policy: (S,); action 0 everywhere if left out, or with discount 1 a proper policy.
        initial_values: Where sweeps start, (S,); zeros if left out.
        sweeps: Of each evaluation, or None for exact evaluation.
        tolerance: Of the values, for sweeps.
        max_iterations: Evaluations at most.

    Raises:
        ValueError: An argument is ill-formed, or with discount 1 a policy that never ends came up.
    """
    default = proper_policy(mdp) if mdp.discount == 1 else np.zeros(mdp.num_states, dtype=np.intp)
    policies = [default if initial_policy is None else _actions(mdp, initial_policy)]
    current, values = _start(mdp, initial_values), []
    for _ in range(_at_least_one("max_iterations", max_iterations)):
        current = policy_evaluation(mdp, policies[-1], sweeps=sweeps, initial_values=current)
        values.append(current)
        policies.append(greedy_policy(mdp, current))
        repeated = bool((policies[-1] == policies[-2]).all())
        if repeated if sweeps is None else _error_bound(mdp, current) <= tolerance:
            return PolicyIterationTrace(policies=tuple(policies), values=tuple(values), converged=True)
    return PolicyIterationTrace(policies=tuple(policies), values=tuple(values), converged=False)


def value_iteration(
    mdp: TabularMDP,
    *,
    order: BackupOrder = "synchronous",
    initial_values: ArrayLike | None = None,
    tolerance: float = 1e-10,
    max_sweeps: int = 100_000,
) -> ValueIterationTrace:
    """Applies the Bellman optimality operator until the values are within the tolerance of v*.

    |v - v*| <= |max_a q - v| / (1 - gamma) in the largest norm; with discount 1 there is no such bound, and the
    residual itself is held to the tolerance.

    Args:
        mdp: The process.
        order: All states from the old values, all states in turn from the newest, or S times the state whose value
            would change most.
        initial_values: (S,); zeros if left out.
        tolerance: Of the values, in their unit.
        max_sweeps: Of S backups each, at most.

    Raises:
        ValueError: An argument is ill-formed.
    """
    if order not in ("synchronous", "in_place", "prioritised"):
        raise ValueError(f"order must be synchronous, in_place or prioritised, got {order!r}")
    values = _start(mdp, initial_values)
    trace = [values]
    for _ in range(_at_least_one("max_sweeps", max_sweeps)):
        if _error_bound(mdp, values) <= tolerance:
            return ValueIterationTrace(values=tuple(trace), converged=True)
        values = q_values(mdp, values).max(-1) if order == "synchronous" else _backups(mdp, values, order)
        trace.append(values)
    return ValueIterationTrace(values=tuple(trace), converged=_error_bound(mdp, values) <= tolerance)


def _backups(mdp: TabularMDP, values: Values, order: BackupOrder) -> Values:
    """S backups of one state after another, in turn or by priority."""
    values, q = values.copy(), q_values(mdp, values)
    for turn in range(mdp.num_states):
        state = turn if order == "in_place" else int(np.argmax(np.abs(q.max(-1) - values)))
        change = q[state].max() - values[state]
        values[state] += change
        q += mdp.discount * mdp.transition[:, :, state] * change
    return values


def _error_bound(mdp: TabularMDP, values: Values) -> float:
    residual = float(np.abs(q_values(mdp, values).max(-1) - values).max())
    return residual / (1 - mdp.discount) if mdp.discount < 1 else residual


def _start(mdp: TabularMDP, values: ArrayLike | None) -> Values:
    start = np.zeros(mdp.num_states) if values is None else np.array(values, dtype=np.float64)
    if start.shape != (mdp.num_states,):
        raise ValueError(f"values must have shape ({mdp.num_states},), got {start.shape}")
    return start


def _actions(mdp: TabularMDP, policy: ArrayLike) -> Policy:
    actions = np.array(policy)
    if actions.shape != (mdp.num_states,) or not np.issubdtype(actions.dtype, np.integer):
        raise ValueError(f"a policy must have {mdp.num_states} integer actions, got {actions.dtype} {actions.shape}")
    if actions.min() < 0 or actions.max() >= mdp.num_actions:
        raise ValueError(f"actions must be in [0, {mdp.num_actions - 1}], got {actions.tolist()}")
    return actions.astype(np.intp)


def _probabilities(mdp: TabularMDP, policy: ArrayLike) -> Values:
    """Action probabilities, (S, A)."""
    given = np.array(policy)
    if given.ndim != 2:
        return np.eye(mdp.num_actions)[_actions(mdp, given)]
    if given.shape != mdp.reward.shape or not ((given >= 0).all() and np.allclose(given.sum(-1), 1, atol=1e-9)):
        raise ValueError(f"a stochastic policy must be {mdp.reward.shape} probabilities whose rows sum to 1")
    return given.astype(np.float64)


def _at_least_one(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
