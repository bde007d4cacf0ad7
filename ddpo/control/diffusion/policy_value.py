"""What a policy of an affine chain still earns from a state on: V_k is a quadratic, by one backward recursion.

    V_T = r,    V_k(x) = -alpha KL_k(x) + E[ V_{k+1}(F_k x + g_k + noise) ]

With KL_k(x) = |dF x + dg|^2_{C^-1} / 2, dF and dg how far the step's mean is from the reference's. T steps.
"""

import torch

from ddpo.control.diffusion.chain import AffineChain, Quadratic


def policy_values(chain: AffineChain, reference: AffineChain, reward: Quadratic, alpha: float) -> tuple[Quadratic, ...]:
    """V_0 .. V_T, T+1 entries.

    Args:
        chain: The policy, with the reference's noise.
        reference: The pretrained chain.
        reward: Earned at x_T.
        alpha: Reward units per nat.
    """
    values = [reward]
    for k in reversed(range(chain.num_steps)):
        F, g, C, after = chain.F[k], chain.g[k], chain.cov[k], values[-1]
        P = F.T @ after.P @ F
        q = F.T @ (after.q - after.P @ g)
        c = after.expectation(g, C)
        if reference.stochastic[k]:
            precision = alpha * torch.linalg.inv(reference.cov[k])
            dF, dg = F - reference.F[k], g - reference.g[k]
            P = P + dF.T @ precision @ dF
            q = q - dF.T @ precision @ dg
            c = c - 0.5 * dg @ precision @ dg
        values.append(Quadratic(P=0.5 * (P + P.T), q=q, c=c))
    return tuple(values[::-1])
