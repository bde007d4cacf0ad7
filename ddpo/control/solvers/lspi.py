"""Least-squares policy iteration with quadratic features, from sampled transitions.

The Q-function of a policy pi on the chain of step dt is V(x) + dt q(x, a), with q(x, pi(x)) = 0. In this form its
Bellman equation keeps the advantage rate q at order 1 as dt -> 0, where Q itself loses its dependence on the action
(Baird 1994; Jia and Zhou, arXiv:2207.00713):

    r = (V(x) - e^(-rho dt) E V(x')) / dt + q(x, a),   V = theta . psi(x),   q = w . [phi(x, a) - phi(x, pi(x))]

It is linear in (theta, w), so their estimate takes one solve with psi and the phi difference as instruments
(least-squares temporal differences, Bradtke and Barto 1996; policy iteration on it, Lagoudakis and Parr 2003). psi
holds 1, x_i, x_i x_j and phi holds a_i, a_i a_j, a_i x_j: exact for regulators, whose greedy policy is affine.

What it converges to is the optimum of the chain, off by O(dt); two steps and Richardson's extrapolation remove that:

    box, push = uniform_box(-2.0, 2.0), uniform_box(-5.0, 5.0)

    def draw(dt: float) -> Transitions:
        rng = torch.Generator().manual_seed(0)
        return sample_transitions(problem, 1_000_000, states=box, actions=push, dt=dt, generator=rng)

    extrapolate(draw, 0.02, problem.discount, AffinePolicy.zero(1, 1)).gain            # 2.66, within 0.2%

B is the batch, n the state's and m the action's dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.control.solvers.transitions import Transitions


@dataclass(frozen=True, kw_only=True)
class AffinePolicy:
    """The policy a = offset - gain x.

    Attributes:
        gain: K, (m, n).
        offset: (m,).
    """

    gain: Tensor
    offset: Tensor

    @classmethod
    def zero(cls, state_dim: int, action_dim: int) -> "AffinePolicy":
        """The policy that does nothing, in float64."""
        gain = torch.zeros(action_dim, state_dim, dtype=torch.float64)
        return cls(gain=gain, offset=gain.new_zeros(action_dim))

    def __call__(self, x: Tensor) -> Tensor:
        """Actions (B, m) of states (B, n)."""
        return self.offset - x @ self.gain.T


@dataclass(frozen=True, kw_only=True)
class LSPIResult:
    """Where least-squares policy iteration ended.

    Attributes:
        policy: The last policy.
        history: The policies after each improvement.
        value_weights: theta, of 1, x_i, and x_i x_j for i <= j.
    """

    policy: AffinePolicy
    history: tuple[AffinePolicy, ...]
    value_weights: Tensor


def lspi(
    transitions: Transitions,
    discount: float,
    policy: AffinePolicy,
    *,
    num_iterations: int = 15,
    tolerance: float = 1e-8,
) -> LSPIResult:
    """Iterates evaluation and improvement on one set of transitions.

    Args:
        transitions: In float64, with actions that do not follow from the states.
        discount: rho > 0, per unit of time.
        policy: Where to start, of finite value.
        num_iterations: Most iterations.
        tolerance: Stops when no entry of the gain changes by more.

    Raises:
        ValueError: The transitions do not determine the features' weights, or the advantage rate has no maximum.
    """
    if not discount > 0:
        raise ValueError(f"the discount rate must be positive, got {discount}")
    history: list[AffinePolicy] = []
    psi, next_psi = _value_features(transitions.state), _value_features(transitions.next_state)
    decay = torch.exp(torch.tensor(-discount * transitions.dt, dtype=psi.dtype))
    change = (psi - decay * next_psi) / transitions.dt
    phi = _action_features(transitions.state, transitions.action)
    weights = psi[0]
    for _ in range(num_iterations):
        difference = phi - _action_features(transitions.state, policy(transitions.state))
        instruments = torch.cat([psi, difference], 1)
        matrix = instruments.T @ torch.cat([change, difference], 1) / len(psi)
        solution, info = torch.linalg.solve_ex(matrix, instruments.T @ transitions.reward / len(psi))
        if int(info) != 0 or not bool(solution.isfinite().all()):
            raise ValueError(
                f"{len(psi)} transitions do not determine {len(matrix)} weights: take more, with actions of their own"
            )
        weights, advantage = solution[: psi.shape[1]], solution[psi.shape[1] :]
        better = _greedy(advantage, transitions.state.shape[1], transitions.action.shape[1])
        moved = float((better.gain - policy.gain).abs().max())
        policy = better
        history.append(policy)
        if moved <= tolerance:
            break
    return LSPIResult(policy=policy, history=tuple(history), value_weights=weights)


def extrapolate(
    draw: Callable[[float], Transitions], dt: float, discount: float, policy: AffinePolicy, *, num_iterations: int = 15
) -> AffinePolicy:
    """Removes the first order in dt: 2 (policy at dt) - (policy at 2 dt), by Richardson.

    Args:
        draw: Transitions of a given step. The same seed for both steps lets part of their noise cancel.
        dt: The finer step.
        discount: rho.
        policy: Where to start.
        num_iterations: Most iterations of each run.
    """
    fine, coarse = (lspi(draw(step), discount, policy, num_iterations=num_iterations).policy for step in (dt, 2 * dt))
    return AffinePolicy(gain=2 * fine.gain - coarse.gain, offset=2 * fine.offset - coarse.offset)


def _value_features(x: Tensor) -> Tensor:
    """psi: 1, x_i, x_i x_j for i <= j, (B, 1 + n + n (n + 1) / 2)."""
    return torch.cat([torch.ones_like(x[:, :1]), x, _squares(x)], 1)


def _action_features(x: Tensor, a: Tensor) -> Tensor:
    """phi: a_i, a_i a_j for i <= j, a_i x_j, (B, m + m (m + 1) / 2 + m n)."""
    return torch.cat([a, _squares(a), (a[:, :, None] * x[:, None]).flatten(1)], 1)


def _squares(z: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(z.shape[1], z.shape[1])
    return z[:, rows] * z[:, columns]


def _greedy(advantage: Tensor, state_dim: int, action_dim: int) -> AffinePolicy:
    """The maximiser of l'a + a'S a + a'C x, with the weights in the order of `_action_features`."""
    rows, columns = torch.triu_indices(action_dim, action_dim)
    linear, square, cross = advantage.split([action_dim, len(rows), action_dim * state_dim])
    curvature = advantage.new_zeros(action_dim, action_dim)
    curvature[rows, columns] = square
    curvature = -(curvature + curvature.T)
    factor, info = torch.linalg.cholesky_ex(curvature)
    if int(info) != 0:
        raise ValueError(
            "the advantage rate has no maximum in the action: take more transitions or a stabilising policy"
        )
    right = torch.cat([cross.view(action_dim, state_dim), linear[:, None]], 1)
    best = torch.cholesky_solve(right, factor)
    return AffinePolicy(gain=-best[:, :-1], offset=best[:, -1])
