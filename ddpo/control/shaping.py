"""Potential-based reward shaping, which changes how fast one learns but not what is optimal.

    r'(s, a, s') = r(s, a, s') + gamma Phi(s') - Phi(s)     =>     q'(s, a) = q(s, a) - Phi(s)

(Ng, Harada and Russell 1999). Along any path the added terms telescope, so every policy's value falls by Phi(s) and no
preference between actions changes. That needs Phi = 0 in terminal states, where the sum ends; with another Phi there,
policies that end in different places gain different amounts.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ddpo.control.mdp import TabularMDP


def shaped(mdp: TabularMDP, potential: ArrayLike) -> TabularMDP:
    """The same process with the shaped reward.

    Args:
        mdp: The process.
        potential: Phi, (S,), in the reward's unit, 0 in terminal states.

    Raises:
        ValueError: The shape is wrong, an entry is not finite, or a terminal state has a potential.
    """
    phi = np.array(potential, dtype=np.float64)
    if phi.shape != (mdp.num_states,) or not np.isfinite(phi).all():
        raise ValueError(f"potential must be {mdp.num_states} finite numbers, got {phi.tolist()}")
    if (phi[mdp.terminal] != 0).any():
        raise ValueError(
            f"the potential must be 0 in terminal states, got {phi[mdp.terminal].tolist()} there; "
            "otherwise the optimal policy may change"
        )
    return replace(mdp, reward=mdp.reward + mdp.discount * mdp.transition @ phi - phi[:, None])
