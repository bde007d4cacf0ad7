"""What the KL weight alpha amounts to once advantages are divided by a scale, over alpha: exactly, and as estimated.

Where s is the scale of a sample, training follows E[A score], A = (r - baseline) / s, and the gradient of alpha KL / s.
For a reward whose score is (r - E r) / Var r times the slope of E r (Gaussian rewards whose mean is trained, successes
whose rate is), with s_g the standard deviation of the group and leave-one-out baselines,

    effective alpha / alpha  =  E[1/s] / ( E[A score] / slope )  =  Var r  E[1/s] / ( G/(G-1) E[s_g^2 / s] )

which is 1 where s is one number, and (G - 1) / (G - 2) for s = s_g and Gaussian rewards. G samples a group.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import integrate, special, stats

from ddpo.credit.advantage_scale import FLAT, ScaleRule
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator


@dataclass(frozen=True, kw_only=True)
class RewardLaw:
    """How the rewards of a prompt are distributed.

    Attributes:
        success: Probability of the reward 1, else 0; None for Gaussian rewards of variance 1.
    """

    success: float | None = None

    def __str__(self) -> str:
        return "Gaussian rewards" if self.success is None else f"success rate {self.success:g}"

    @property
    def variance(self) -> float:
        """Var r."""
        return 1.0 if self.success is None else self.success * (1 - self.success)


def exact_ratio(law: RewardLaw, rule: ScaleRule, group_size: int) -> float:
    """Effective alpha over alpha for many samples; infinite where E[1/s] diverges.

    Args:
        law: Of the rewards.
        rule: See `ddpo.credit.advantage_scale`.
        group_size: G, at least 2.
    """
    if rule in ("none", "batch_std"):
        return 1.0
    typical = math.sqrt(law.variance * (group_size - 1) / group_size)
    if law.success is None and rule == "std":
        return (group_size - 1) / (group_size - 2) if group_size > 2 else math.inf

    def scale(spread: float) -> float:
        if rule == "std":
            return spread or math.inf
        return spread if spread >= FLAT * typical else typical

    def of_spread(weight: int) -> float:
        """E[s_g^weight / s]."""
        if law.success is None:
            chi = stats.chi(group_size - 1, scale=1 / math.sqrt(group_size))
            edges = (0.0, FLAT * typical, chi.ppf(0.5), chi.isf(1e-12))
            parts = [
                integrate.quad(lambda s: s**weight / scale(s) * chi.pdf(s), low, high, epsabs=1e-12)[0]
                for low, high in zip(edges, edges[1:], strict=False)
            ]
            return sum(parts)
        shares = np.arange(group_size + 1) / group_size
        spreads = np.sqrt(shares * (1 - shares))
        law_of = stats.binom.pmf(np.arange(group_size + 1), group_size, law.success)
        return float(sum(p * s**weight / scale(float(s)) for p, s in zip(law_of, spreads, strict=True)))

    return law.variance * of_spread(0) / (group_size / (group_size - 1) * of_spread(2))


def estimated_ratio(
    law: RewardLaw, config: AdvantageConfig, group_size: int, *, batch: int = 4096, num_batches: int = 32, seed: int = 0
) -> float:
    """The same from the advantages and weights that training is given, by Monte Carlo.

    One step of a policy x ~ N(theta, 1), of score x - theta, whose reward is x, or 1 above the quantile that gives the
    success rate.

    Args:
        law: Of the rewards.
        config: What is asked about; the baseline is the group's or the batch's.
        group_size: G.
        batch: Samples that are scored together.
        num_batches: How often.
        seed: Of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(batch) // group_size
    threshold = 0.0 if law.success is None else -float(special.ndtri(law.success))
    slope = 1.0 if law.success is None else float(stats.norm.pdf(threshold))
    estimator = AdvantageEstimator(config)
    weight, gradient = 0.0, 0.0
    for _ in range(num_batches):
        x = torch.randn(batch, generator=generator, dtype=torch.float64)
        rewards = x if law.success is None else (x > threshold).double()
        found = estimator(rewards, groups, [""] * batch, kl=x.new_zeros(batch, 1), alpha=1.0, num_steps=1)
        weight += float(found.kl_weight.double().mean())
        gradient += float((found.values[:, 0].double() * x).mean())
    return weight / (gradient / slope)
