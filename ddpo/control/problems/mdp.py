"""A finite Markov decision process: S states, A actions, transition p(s'|s, a), expected reward r(s, a) and discount.

With discount 1 a value is defined only for proper policies, those that end in a terminal state from every state
(Bertsekas and Tsitsiklis 1991).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Policy = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class TabularMDP:
    """A finite Markov decision process.

    A state is terminal if every action stays in it for a reward of 0; its value is 0.

    Attributes:
        transition: p(s'|s, a), (S, A, S).
        reward: r(s, a), (S, A), expected; given as r(s, a, s'), (S, A, S), it is averaged over s'.
        discount: gamma in [0, 1]; 1 only where every state can reach a terminal one.
        state_names: (S,), or empty.
        action_names: (A,), or empty.

    Raises:
        ValueError: Shapes disagree, a row of transition is no distribution, or the discount is out of range.
    """

    transition: NDArray[np.float64]
    reward: NDArray[np.float64]
    discount: float
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        transition, reward = np.array(self.transition, dtype=np.float64), np.array(self.reward, dtype=np.float64)
        if transition.ndim != 3 or transition.shape[0] != transition.shape[2] or 0 in transition.shape:
            raise ValueError(f"transition must have shape (states, actions, states), got {transition.shape}")
        if reward.shape not in (transition.shape, transition.shape[:2]):
            raise ValueError(f"reward must have shape {transition.shape[:2]} or {transition.shape}, got {reward.shape}")
        if not np.isfinite(reward).all():
            raise ValueError("every reward must be finite")
        faults = np.argwhere(~((transition >= 0).all(-1) & (np.abs(transition.sum(-1) - 1) <= 1e-9)))
        if len(faults):
            state, action = faults[0]
            raise ValueError(
                f"transition[{state}, {action}] is no distribution: {transition[state, action].tolist()} sums to "
                f"{transition[state, action].sum():.12g}; every row must be nonnegative and sum to 1"
            )
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], got {self.discount}")
        for name, given, wanted in (("state", self.state_names, 0), ("action", self.action_names, 1)):
            if given and len(given) != transition.shape[wanted]:
                raise ValueError(f"needs {transition.shape[wanted]} {name}_names or none, got {len(given)}")
        object.__setattr__(self, "transition", transition)
        object.__setattr__(self, "reward", (transition * reward).sum(-1) if reward.ndim == 3 else reward)
        if self.discount == 1:
            proper_policy(self)

    @property
    def num_states(self) -> int:
        """S."""
        return self.transition.shape[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.transition.shape[1]

    @property
    def terminal(self) -> NDArray[np.bool_]:
        """Which states are terminal, (S,)."""
        stays = self.transition[np.arange(self.num_states), :, np.arange(self.num_states)] == 1
        return (stays & (self.reward == 0)).all(-1)


def proper_policy(mdp: TabularMDP) -> Policy:
    """A policy under which every state ends in a terminal one, (S,): each action may lead one step closer.

    Raises:
        ValueError: From some state no terminal one can be reached.
    """
    ends, policy = mdp.terminal, np.zeros(mdp.num_states, dtype=np.intp)
    while not ends.all():
        closer = mdp.transition[:, :, ends].sum(-1) > 0
        found = closer.any(-1) & ~ends
        if not found.any():
            raise ValueError(
                f"no policy is proper: state {_name(mdp, int(np.argmin(ends)))} cannot reach a terminal state, so with "
                "discount 1 its value is not defined; add a way out or take a discount below 1"
            )
        policy[found] = np.argmax(closer, axis=-1)[found]
        ends = ends | found
    return policy


def require_proper(mdp: TabularMDP, transition: NDArray[np.float64]) -> None:
    """Checks that a policy's chain, of transition (S, S), ends from every state.

    Raises:
        ValueError: From some state it does not.
    """
    ends = mdp.terminal
    for _ in range(mdp.num_states):
        ends = ends | (transition[:, ends].sum(-1) > 0)
    if not ends.all():
        raise ValueError(
            f"the policy is not proper: from state {_name(mdp, int(np.argmin(ends)))} it reaches no terminal state, so "
            "with discount 1 its value is not defined; start from proper_policy(mdp) or take a discount below 1"
        )


def spaceship() -> TabularMDP:
    """Space exploration: a spacecraft with full, low or no energy conserves or explores, gamma = 1/2.

    Full, conserve: stays full, reward 1. Full, explore: full or low with probability 1/2 each, reward 2. Low, conserve:
    full or low with probability 1/2 each, reward 1. Low, explore: depleted, reward -10. Depleted is terminal.
    v* = (7/2, 5/2, 0), and the optimal policy is (explore, conserve).
    """
    return TabularMDP(
        transition=np.array(
            [[[1, 0, 0], [0.5, 0.5, 0]], [[0.5, 0.5, 0], [0, 0, 1]], [[0, 0, 1], [0, 0, 1]]], dtype=np.float64
        ),
        reward=np.array([[1, 2], [1, -10], [0, 0]], dtype=np.float64),
        discount=0.5,
        state_names=("FullEnergy", "LowEnergy", "Depleted"),
        action_names=("Conserve", "Explore"),
    )


def _name(mdp: TabularMDP, state: int) -> str:
    return mdp.state_names[state] if mdp.state_names else str(state)
