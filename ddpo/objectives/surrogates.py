"""What a policy gradient minimises at each transition: surrogates of -A log pi, and the ratios that they are made of.

With rho the ratio of a step's densities after and before the updates of an epoch, D latent dimensions, mu and s the
step's mean and standard deviation, z = (x' - mu_old) / s the noise that was drawn and dmu = mu - mu_old:

    ratio           log rho'                                                             power (below)
    joint           log rho                                                              1
    per_dimension   log rho / D                                                          1 / D
    guard           s (log rho + |dmu|^2 / (2 s^2)) / D  =  mean_d(z dmu)                s / D

log rho itself has the mean -|dmu|^2 / (2 s^2) under the policy that sampled and the spread |dmu| / s, so that a clip
around rho = 1 binds one sign of the advantage more than the other, and late steps, whose s is small, more than early
ones. That of `guard` has mean 0 and the spread |dmu| / D, whatever the step (GRPO-Guard, arXiv:2510.22319).

    reinforce   -A log pi                                                           (Williams 1992)
    ppo         -min(A rho', A clip(rho', 1 +- eps)) / power                        (arXiv:1707.06347, eq. 7)
    masked      -A rho' / power, or 0 where KL(old || pi) >= d and A and rho' - 1 have one sign: where the step has
                left the trust region and the term would drive it further           (Flow-DPPO, arXiv:2606.11025)

`power` is the slope of log rho' by log rho at pi = pi_old: divided by it, all of them have the gradient -A grad log pi
there, that of J. Deviation from GRPO-Guard, which divides by the step's time and thereby weighs the steps.

N transitions.
"""

import torch
from torch import Tensor

from ddpo.sampling.gaussian import Gaussian


def centred_log_ratio(distribution: Gaussian, x: Tensor, old_mean: Tensor) -> Tensor:
    """Log rho + |dmu|^2 / (2 s^2) = <z, dmu> / s, (N,) float64 nats; its mean under the old policy is 0.

    Args:
        distribution: Of the step after the updates, with its std > 0.
        x: What was sampled, (N, *latent).
        old_mean: Mean of what it was sampled from, (N, *latent); the std is the same.
    """
    product = (x - old_mean) * (distribution.mean - old_mean) / distribution.std**2
    return product.flatten(1).sum(1, dtype=torch.float64)


def reinforce_loss(
    log_ratio: Tensor, advantages: Tensor, *, power: Tensor | float, bound: float, divergence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-A log pi, up to a constant; valid only at the sampling parameters.

    Args:
        log_ratio: log pi - log pi_old, (N,) nats.
        advantages: (N,).
        power: Unused; the gradient does not depend on it.
        bound: Unused; there is nothing to bound on-policy.
        divergence: Unused.

    Returns:
        Losses (N,) whose gradient is -A grad log pi, and whether the term was dropped, (N,) float.
    """
    return -advantages * log_ratio, torch.zeros_like(log_ratio)


def ppo_loss(
    log_ratio: Tensor, advantages: Tensor, *, power: Tensor | float, bound: float, divergence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate on rho' = exp(power * log_ratio), divided by `power`.

    Args:
        log_ratio: log pi - log pi_old, or `centred_log_ratio`, (N,) nats.
        advantages: (N,).
        power: See the module, a number or (N,).
        bound: Half-width of the clip of rho' around 1.
        divergence: Unused.

    Returns:
        Losses (N,) whose gradient at rho' = 1 is -A grad log pi, and whether the clip was active, (N,) float.
    """
    ratio = torch.exp(power * log_ratio)
    free = advantages * ratio
    bounded = advantages * ratio.clamp(1 - bound, 1 + bound)
    return -torch.minimum(free, bounded) / power, (bounded < free).detach().float()


def masked_loss(
    log_ratio: Tensor, advantages: Tensor, *, power: Tensor | float, bound: float, divergence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The unclipped surrogate, without the terms that would drive a step further out of its trust region.

    Args:
        log_ratio: log pi - log pi_old, or `centred_log_ratio`, (N,) nats.
        advantages: (N,).
        power: See the module, a number or (N,).
        bound: Nats of KL(old || pi) of a step from which on it has left the trust region.
        divergence: That KL, (N,) nats, without a graph.

    Returns:
        Losses (N,) whose gradient at rho' = 1 is -A grad log pi, and whether the term was dropped, (N,) float.
    """
    assert divergence is not None, "the means of sampling are kept"
    outward = advantages * log_ratio.detach() > 0
    dropped = outward & (divergence >= bound)
    loss = -advantages * torch.exp(power * log_ratio) / power
    return loss.masked_fill(dropped, 0.0), dropped.float()
