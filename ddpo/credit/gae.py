"""Generalised advantage estimation over a denoising chain (Schulman et al., arXiv:1506.02438), without discount.

A step earns g_k = -alpha KL_k, the chain's end r(x_T). With a value function V_k(x) of what is still to be earned at
x_k = x, of which V_T = 0, and r as what the last step leads to,

    delta_k = g_k + V_{k+1}(x_{k+1}) - V_k(x_k),    delta_{T-1} = g_{T-1} + r(x_T) - V_{T-1}(x_{T-1})
    A_k     = sum_{j >= k} (prod_{k < i <= j} lambda_i) delta_j,    lambda_i = lambda at steps with noise, else 1

At lambda = 1 the sum telescopes to what was earned from x_k on minus V_k(x_k), whose mean gives the exact gradient for
any V, since V_k does not depend on the action of step k. Below 1 it is exact for the policy's own value function alone,
with less variance. A step without noise is no decision, so nothing is discounted at it: its state is a function of the
one before, and lambda would add V's error there for nothing.

KL_k depends on x_k and not on the action: it cancels against its own part of V_k on average.

B samples, T steps; further axes, such as one of rewards, are carried along.
"""

import torch
from torch import Tensor


def generalised_advantages(
    final: Tensor, earned: Tensor, values: Tensor, *, gae_lambda: float, decisions: Tensor
) -> Tensor:
    """Advantages A_k, (B, T, ...).

    Args:
        final: What the chain's end earns, (B, ...).
        earned: What each step earns, g_k, (B, T, ...).
        values: V_k at the sampled states x_0 .. x_{T-1}, (B, T, ...).
        gae_lambda: In [0, 1].
        decisions: Which steps have noise, (T,) bool.
    """
    after = torch.cat([values[:, 1:], final[:, None]], dim=1)
    deltas = earned + after - values
    advantages = [deltas[:, -1]]
    for k in reversed(range(deltas.shape[1] - 1)):
        decay = gae_lambda if decisions[k + 1] else 1.0
        advantages.append(deltas[:, k] + decay * advantages[-1])
    return torch.stack(advantages[::-1], dim=1)


def returns(final: Tensor, earned: Tensor) -> Tensor:
    """What was earned from each state on, (B, T, ...); arguments as for `generalised_advantages`."""
    return final[:, None] + earned.flip(1).cumsum(1).flip(1)


def explained_variance(found: Tensor, values: Tensor) -> Tensor:
    """1 - mean (R - V)^2 / Var R of every step, (T,); a constant error counts. NaN where all returns are the same.

    Args:
        found: Returns R, (B, T).
        values: V, (B, T).
    """
    variance = found.var(0, correction=0)
    return 1 - (found - values).square().mean(0) / variance.where(variance > 0, torch.nan)
