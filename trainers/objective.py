"""What an epoch's samples are worth: the weighted rewards, plus the constraints' multipliers times what they bound.

    objective_b = sum_j w_j n_j(r_j(b)) + sum_i +-m_i s_i(b),    m_i from the epoch's means (`ddpo.lagrangian`)

The path KL's multiplier is not a score: it adds to alpha, the weight of the KL in cost-to-go and loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.lagrangian import KL_NAME, Multipliers
from ddpo.potential import held_potential
from rewards import Scores, WeightedSum


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """The constraints in one epoch; dictionaries by the name of what is bounded.

    Attributes:
        means: Means over all samples.
        weights: m, the weight that each bounded score got.
        multipliers: lambda, of which m was made.
    """

    means: dict[str, float]
    weights: dict[str, float]
    multipliers: dict[str, float]

    @property
    def alpha(self) -> float:
        """What the bound on the path KL adds to alpha."""
        return self.weights.get(KL_NAME, 0.0)


def pressure(multipliers: Multipliers, reward: WeightedSum, scores: Scores, *, path_kl: float) -> Pressure:
    """Measures the constraints on an epoch's samples, of all processes.

    Raises:
        ValueError: A constraint names a component that the rewards do not report.
    """
    means = {}
    for name in multipliers.constraints:
        means[name] = path_kl if name == KL_NAME else float(_bounded(scores.components, reward, name).double().mean())
    return Pressure(means=means, weights=multipliers.weights(means), multipliers=dict(multipliers.values))


def objective_scores(
    multipliers: Multipliers, reward: WeightedSum, scores: Scores, prompts: Sequence[str], under: Pressure
) -> Tensor:
    """The objective of each sample, (B,), by the present scales and weights."""
    total = reward.total(scores.components, prompts)
    for name, constraint in multipliers.constraints.items():
        if name != KL_NAME:
            total = total + constraint.sign * under.weights[name] * _bounded(scores.components, reward, name)
    return total


def potential(
    by_step: Mapping[int, Scores],
    multipliers: Multipliers,
    reward: WeightedSum,
    prompts: Sequence[str],
    under: Pressure,
    *,
    strength: float,
    num_steps: int,
) -> Tensor | None:
    """The shaping potential before each action, (B, T): the objective of the predicted clean images; None for none."""
    if not by_step:
        return None
    values = {
        k: strength * objective_scores(multipliers, reward, scores, prompts, under) for k, scores in by_step.items()
    }
    return held_potential(values, num_steps)


def explained(scores: Tensor, values: Tensor | None) -> float:
    """Share of the scores' variance that the last measured potential explains, 1 - Var(r - phi) / Var(r); NaN if none.

    Args:
        scores: Objective, (B,).
        values: Potential, (B, T).
    """
    if values is None or float(scores.var(correction=0)) == 0.0:
        return float("nan")
    residual = (scores - values[:, -1]).double()
    return float(1 - residual.var(correction=0) / torch.as_tensor(scores).double().var(correction=0))


def _bounded(components: Mapping[str, Tensor], reward: WeightedSum, name: str) -> Tensor:
    key = reward.component_of(name)
    if key not in components:
        raise ValueError(
            f"constraints: there is no reward or component {name!r}; this run reports {', '.join(components)}"
        )
    return components[key]
