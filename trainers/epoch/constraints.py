"""What the constraints' multipliers add to what an epoch's samples are worth.

    worth_b = total_b + sum_i +-m_i(b) s_i(b),    m_i(b) from the mean over the others (`ddpo.credit.lagrangian`)

The path KL's multiplier is not a score: it adds to alpha, the weight of the KL in cost-to-go and loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ddpo.credit.lagrangian import KL_NAME, Multipliers
from ddpo.validation import UserError
from rewards import Scores, WeightedSum


@dataclass(frozen=True, kw_only=True)
class ConstraintReport:
    """The constraints in one epoch; dictionaries by the name of what is bounded.

    Attributes:
        means: Means over all samples.
        weights: m at these means; that of the path KL adds to alpha.
        multipliers: lambda, mu or t, of which m was made.
        of_samples: m of each sample, (N,), by the mean over the others; of scores alone.
    """

    means: dict[str, float]
    weights: dict[str, float]
    multipliers: dict[str, float]
    of_samples: dict[str, Tensor]

    @property
    def alpha(self) -> float:
        """What the bound on the path KL adds to alpha."""
        return self.weights.get(KL_NAME, 0.0)


def measure_constraints(
    multipliers: Multipliers, reward: WeightedSum, scores: Scores, *, path_kl: float | None
) -> ConstraintReport:
    """Measures the constraints on an epoch's samples, of all processes.

    Args:
        multipliers: Of the constraints.
        reward: Knows by what name a score is reported.
        scores: Of the epoch.
        path_kl: Mean path KL, nats; None where it is neither measured nor bounded.

    Raises:
        ValueError: A constraint names a component that the rewards do not report.
    """
    means, of_samples = {}, {}
    for name in multipliers.constraints:
        if name == KL_NAME:
            assert path_kl is not None, "a bound on the KL has it measured"
            means[name] = path_kl
        else:
            bounded = _bounded(scores.components, reward, name)
            means[name] = float(bounded.double().mean())
            of_samples[name] = multipliers.weights_of_samples(name, bounded)
    return ConstraintReport(
        means=means,
        weights=multipliers.weights(means),
        multipliers=dict(multipliers.values),
        of_samples=of_samples,
    )


def constrained_scores(
    multipliers: Multipliers, reward: WeightedSum, scores: Scores, report: ConstraintReport, *, compared: bool = False
) -> Tensor:
    """What is maximised of each sample, (B,): its total, with what the constraints add.

    Args:
        multipliers: Of the constraints.
        reward: Knows by what name a score is reported.
        scores: Total, and all components.
        report: What the constraints measured.
        compared: Whether only constraints on what compares the images of a group add to it.
    """
    total = scores.total
    for name, constraint in multipliers.constraints.items():
        if name != KL_NAME and (not compared or reward.compares(reward.component_of(name))):
            weights = report.of_samples[name]
            total = total + constraint.sign * weights.to(total) * _bounded(scores.components, reward, name)
    return total


def _bounded(components: Mapping[str, Tensor], reward: WeightedSum, name: str) -> Tensor:
    key = reward.component_of(name)
    if key not in components:
        raise UserError(
            f"constraints: there is no reward or component {name!r}; this run reports {', '.join(components)}"
        )
    return components[key]
