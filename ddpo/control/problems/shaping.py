"""Potential-based reward shaping, which changes how fast one learns but not what is optimal.

    r'(s, a, s') = r(s, a, s') + gamma Phi(s') - Phi(s)     =>     q'(s, a) = q(s, a) - Phi(s)

(Ng, Harada and Russell 1999). Along any path the added terms telescope, so every policy's value falls by Phi(s) and no
preference between actions changes. That needs Phi = 0 in terminal states, where the sum ends; with another Phi there,
policies that end in different places gain different amounts.

With a finite horizon T and no discount the potential may depend on time, Phi_k(s), and must be 0 at the end:

    r'_k(s, a, s') = r_k(s, a, s') + Phi_{k+1}(s') - Phi_k(s),  Phi_T = 0     =>     q'_k(s, a) = q_k(s, a) - Phi_k(s)

This is the case of a denoising chain, see `ddpo.credit.potential`.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddpo.control.problems.mdp import TabularMDP


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


def shaped_horizon(transition: ArrayLike, reward: ArrayLike, potential: ArrayLike) -> NDArray[np.float64]:
    """The shaped expected reward of a process with T steps and no discount, (T, S, A).

    Args:
        transition: p(s'|s, a), (S, A, S).
        reward: r_k(s, a), (T, S, A).
        potential: Phi_k(s) for k = 0 .. T, (T + 1, S), in the reward's unit, 0 at k = T.

    Raises:
        ValueError: The shapes disagree, or the potential does not end at 0.
    """
    p, r, phi = (np.array(values, dtype=np.float64) for values in (transition, reward, potential))
    if phi.shape != (len(r) + 1, p.shape[0]) or r.shape[1:] != p.shape[:2]:
        raise ValueError(f"transition {p.shape}, reward {r.shape} and potential {phi.shape} must be (S, A, S), "
                         "(T, S, A) and (T + 1, S)")  # fmt: skip
    if (phi[-1] != 0).any():
        raise ValueError(f"the potential must be 0 after the last step, got {phi[-1].tolist()}")
    return r + np.einsum("iaj,kj->kia", p, phi[1:]) - phi[:-1, :, None]


def horizon_q_values(transition: ArrayLike, reward: ArrayLike) -> NDArray[np.float64]:
    """Optimal q_k(s, a) of a process with T steps and no discount by backward induction, (T, S, A).

    Args:
        transition: p(s'|s, a), (S, A, S).
        reward: r_k(s, a), (T, S, A).
    """
    p, r = np.array(transition, dtype=np.float64), np.array(reward, dtype=np.float64)
    q = np.zeros_like(r)
    value = np.zeros(p.shape[0])
    for k in reversed(range(len(r))):
        q[k] = r[k] + p @ value
        value = q[k].max(axis=1)
    return q
