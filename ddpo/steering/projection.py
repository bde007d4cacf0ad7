"""Bounds on the means of scores, kept by the weights of particles: the law nearest to the tilted one that meets them.

    minimise KL(q || p exp(r / alpha) / Z)  over q with  E_q[s_i] >= a_i  or  E_q[s_i] <= b_i
    q = p exp(r / alpha - sum_i lambda_i c_i) / Z(lambda),    c_i(x) = a_i - s_i(x)  or  s_i(x) - b_i
    lambda = argmin over lambda >= 0 of  D(lambda) = (1/G) sum_g log sum_p w_gp exp(-sum_i lambda_i c_i(x_gp))

(Csiszar 1975; Boyd & Vandenberghe, Convex Optimization, section 5.2.) D is convex and its slope in lambda_i is minus
the weighted mean of c_i. On particles of weights w this is exact as they grow. One multiplier serves all samples, as
one serves all samples of an epoch in training: a bound is on the mean over samples. Multipliers are found one after
the other, each by bisection, until none moves.

G samples, P particles each. lambda is in nats per unit of the score.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpo.credit.lagrangian import KL_NAME, Constraint
from ddpo.validation import UserError

_HALVINGS = 60
_ROUNDS = 200
_TOLERANCE = 1e-9  # of the range of a score, by which a mean may miss its bound


def projected(
    log_weights: Tensor, scores: Mapping[str, Tensor], constraints: Sequence[Constraint]
) -> tuple[Tensor, dict[str, float]]:
    """Log-weights that meet bounds, and the multipliers that they took.

    Args:
        log_weights: (G, P) float64, not normalised.
        scores: What is bounded, by name, (G, P) each.
        constraints: Of different names among them.

    Returns:
        Log-weights, (G, P), and multipliers by name, 0 where a bound is met already.

    Raises:
        UserError: No weights of these particles meet a bound, or not together.
    """
    violations = {one.reward: one.violation(scores[one.reward].double()) for one in constraints}
    for one in constraints:
        _check_possible(one, violations[one.reward], log_weights)
    found = dict.fromkeys(violations, 0.0)
    for _ in range(_ROUNDS):
        before = dict(found)
        for name, violation in violations.items():
            others = _moved(log_weights, violations, {**found, name: 0.0})
            found[name] = _multiplier(others, violation, start=found[name])
        if all(abs(found[name] - before[name]) <= 1e-6 * (1 + abs(found[name])) for name in found):
            return _moved(log_weights, violations, found), found
    raise UserError(
        f"no weights of these particles meet the constraints on {', '.join(found)} together; take looser "
        "bounds or more particles"
    )


def check_bounds(constraints: Sequence[Constraint], names: Sequence[str]) -> None:
    """Refuses bounds on what has no score.

    Args:
        constraints: On steered samples.
        names: Of the scores.

    Raises:
        UserError: One is on the path KL, which steered samples do not have, or on no score.
    """
    for one in constraints:
        if one.reward == KL_NAME:
            raise UserError("constraints: a bound on kl needs the policy's own chains, and steered ones are not")
        if one.reward not in names:
            raise UserError(f"constraints: there is no score {one.reward!r}, only {', '.join(names)}")


def weighted_mean(log_weights: Tensor, scores: Tensor) -> float:
    """Mean over samples of the weighted mean of a sample's particles; both (G, P)."""
    return float((log_weights.softmax(1) * scores).sum(1).mean())


def _moved(log_weights: Tensor, violations: Mapping[str, Tensor], multipliers: Mapping[str, float]) -> Tensor:
    return log_weights - sum(multipliers[name] * violation for name, violation in violations.items())


def _multiplier(log_weights: Tensor, violation: Tensor, *, start: float) -> float:
    """The least lambda >= 0 at which the mean violation is at most 0."""
    if weighted_mean(log_weights, violation) <= 0:
        return 0.0
    scale = float((violation.amax(1) - violation.amin(1)).max())
    high = max(start, 1 / scale)
    while weighted_mean(log_weights - high * violation, violation) > _TOLERANCE * scale:
        high *= 2
        if high * scale > 1e12:
            raise UserError("no weights of these particles meet the constraints together; take looser bounds")
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if weighted_mean(log_weights - middle * violation, violation) > 0:
            low = middle
        else:
            high = middle
    return high


def _check_possible(constraint: Constraint, violation: Tensor, log_weights: Tensor) -> None:
    """Refuses a bound that even the best particle of every sample misses."""
    least = float(violation.where(log_weights.isfinite(), torch.inf).amin(1).mean())
    if least < 0 or (least == 0 and bool((violation == violation[:, :1]).all())):
        return
    is_lower = constraint.at_most is None
    bound = (constraint.at_least if is_lower else constraint.at_most) or 0.0
    side = "at least" if is_lower else "at most"
    raise UserError(
        f"constraints: {constraint.reward} cannot be {side} {bound:g} in the mean: the best of every sample's "
        f"particles have {bound - constraint.sign * least:.4g}; take a looser bound or more particles"
    )
