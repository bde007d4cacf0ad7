"""The third verb of an epoch: from scores to what every step of every sample is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.credit.advantage_scale import group_std
from ddpo.credit.advantages import AdvantageEstimator, Advantages, Expected, Part
from ddpo.credit.gae import explained_variance, returns
from ddpo.credit.lagrangian import KL_NAME, Multipliers
from ddpo.credit.potential import held_potential
from ddpo.objectives import Experience
from ddpo.validation import check
from rewards import Scores, WeightedSum
from trainers.epoch.constraints import ConstraintReport, constrained_scores, measure_constraints
from trainers.epoch.critic import Outcome
from trainers.epoch.path_kl import EpochKL
from trainers.epoch.score import Scored


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """How well a critic has foreseen what an epoch's samples earned, before it was fitted to them.

    Attributes:
        explained: Share of the variance of what was earned from each step on that it explains, (T,).
        error: Root mean square of its error over samples and steps, reward units.
    """

    explained: Tensor
    error: float


@dataclass(frozen=True, kw_only=True)
class Credit:
    """What an epoch's samples are worth.

    Attributes:
        experience: This process's samples, as the objective takes them.
        advantages: Of all processes' samples.
        constraints: What the constraints measured and added.
        alpha: KL weight that was used, reward units per nat.
        shaping: Share of the variance of the scores that the last intermediate reward explains; NaN without shaping.
        outcome: What a critic expected and what came; None without one.
        foresight: How far apart the two are; None without a critic.
    """

    experience: Experience
    advantages: Advantages
    constraints: ConstraintReport
    alpha: float
    shaping: float
    outcome: Outcome | None = None
    foresight: Foresight | None = None


@dataclass(frozen=True, kw_only=True)
class CreditRules:
    """How an epoch's scores become credit.

    Attributes:
        reward: Knows names and weights of the scores.
        multipliers: Of the constraints.
        estimator: Turns scores into advantages; may remember scores per prompt.
        shaping_strength: Factor on the scores of predicted images.
        paired: Whether samples 2j and 2j + 1 were drawn together.
        warmup_epochs: Epochs in which a critic is no baseline yet.
    """

    reward: WeightedSum
    multipliers: Multipliers
    estimator: AdvantageEstimator
    shaping_strength: float
    paired: bool = False
    warmup_epochs: int = 0


def credit(
    scored: Scored,
    kl: EpochKL | None,
    *,
    rules: CreditRules,
    alpha: float,
    epoch: int,
    groups: Tensor,
    prompts: Sequence[str],
    own: range,
    outcome: Outcome | None = None,
) -> Credit:
    """Constraints, shaping, the KL's cost-to-go and baselines make advantages of scores.

    Args:
        scored: Samples of this process, scores of all N.
        kl: To the pretrained model; None where it is not measured.
        rules: How.
        alpha: Weight of the KL before the constraints, reward units per nat.
        epoch: Finished epochs.
        groups: Which samples share a prompt slot, (N,) int64.
        prompts: What tells the N samples' prompts apart.
        own: Places of this process's samples.
        outcome: What a critic expected and what came; None without one.
    """
    scores, path = scored.scores, scored.samples.trajectory
    reward, multipliers = rules.reward, rules.multipliers
    report = measure_constraints(multipliers, reward, scores, path_kl=None if kl is None else kl.held)
    worth = constrained_scores(multipliers, reward, scores, report)
    glimpses = {k: constrained_scores(multipliers, reward, values, report) for k, values in scored.predicted.items()}
    by_step = {k: worth for k, worth in glimpses.items() if isinstance(k, int)}
    contests = {k: worth for k, worth in glimpses.items() if not isinstance(k, int)}
    compared = None
    if scored.compared is not None:
        part = Scores(total=scored.compared, components=scores.components)
        compared = constrained_scores(multipliers, reward, part, report, compared=True)
    potential = shaping_potential(by_step, strength=rules.shaping_strength, num_steps=path.schedule.num_steps)
    alpha = alpha + report.alpha
    expected = None if outcome is None else expected_worth(outcome, rules, report, alpha=alpha, epoch=epoch)
    advantages = rules.estimator(
        worth,
        groups,
        prompts,
        kl=None if kl is None else kl.of_all,
        alpha=0.0 if kl is None or kl.of_all is None else alpha,  # objectives that weigh it alone take the experience's
        num_steps=path.schedule.num_steps,
        parts=_parts(reward, scores, epoch=epoch),
        potential=potential,
        compared=compared,
        distances=_distances(rules, scores),
        twins=torch.arange(len(groups)) // 2 if rules.paired else None,
        expected=expected if epoch >= rules.warmup_epochs else None,
    )
    rows, device = slice(own.start, own.stop), path.log_probs.device
    experience = Experience(
        samples=scored.samples,
        start=own.start,
        scores=worth,
        groups=groups,
        advantages=advantages.values[rows].to(device),
        kl_weight=advantages.kl_weight[rows].to(device),
        contests=contest_scores(contests),
        penalised=alpha > 0,
        alpha=alpha,
        scale=advantages.scale[rows].to(device),
    )
    return Credit(
        experience=experience,
        advantages=advantages,
        constraints=report,
        alpha=alpha,
        shaping=explained(worth, potential, rules.estimator.population(groups)),
        outcome=outcome,
        foresight=None if expected is None else foresight(worth, kl, expected, alpha=alpha),
    )


def expected_worth(
    outcome: Outcome, rules: CreditRules, report: ConstraintReport, *, alpha: float, epoch: int
) -> Expected:
    """What a critic expects of samples, of its heads combined as the scores are: total, constraints, and the KL's cost.

    Args:
        outcome: Values of every head.
        rules: Weights of the scores and of the constraints.
        report: What the constraints measured.
        alpha: Weight of the KL, the constraints' part included.
        epoch: Finished epochs.
    """
    by_head = dict(zip(outcome.heads, outcome.values.unbind(-1), strict=True))
    cost = by_head.pop(KL_NAME, None)
    steps = []
    for k in range(outcome.values.shape[1]):
        components = {name: values[:, k] for name, values in by_head.items()}
        part = Scores(total=rules.reward.total(components, epoch=epoch), components=components)
        steps.append(constrained_scores(rules.multipliers, rules.reward, part, report))
    worth = torch.stack(steps, dim=1)
    return Expected(values=worth if cost is None else worth - alpha * cost, decisions=outcome.decisions)


def foresight(worth: Tensor, kl: EpochKL | None, expected: Expected, *, alpha: float) -> Foresight:
    """How far what a critic expected is from what was earned.

    Args:
        worth: Of the samples, (N,).
        kl: To the pretrained model.
        expected: Of the samples.
        alpha: Weight of the KL.
    """
    cost = None if kl is None else kl.of_all
    earned = torch.zeros_like(expected.values) if cost is None else -alpha * cost.double()
    found = returns(worth.double(), earned)
    error = float((found - expected.values).square().mean().sqrt())
    return Foresight(explained=explained_variance(found, expected.values), error=error)


def contest_scores(by_contender: Mapping[tuple[int, int], Tensor]) -> Tensor | None:
    """What contenders are worth, (N, C, M), of their worth (N,) by contended step and number; None for none."""
    if not by_contender:
        return None
    steps = sorted({c for c, _ in by_contender})
    each = [torch.stack([by_contender[key] for key in sorted(by_contender) if key[0] == c], dim=1) for c in steps]
    return torch.stack(each, dim=1)


def shaping_potential(by_step: Mapping[int, Tensor], *, strength: float, num_steps: int) -> Tensor | None:
    """The potential before each action, (N, T), of the worth of predicted clean images by step; None for none."""
    if not by_step:
        return None
    return held_potential({k: strength * worth for k, worth in by_step.items()}, num_steps)


def explained(scores: Tensor, values: Tensor | None, population: Tensor) -> float:
    """Share of the variance that the last measured potential explains, 1 - Var(r - phi) / Var(r); NaN if none.

    Variances are those about the baseline, within its population: what prompts differ by on the whole, a baseline of
    each group takes away without a potential.

    Args:
        scores: What is maximised, (N,).
        values: Potential, (N, T).
        population: Numbers of the samples that share a baseline, (N,) int64.
    """
    if values is None:
        return float("nan")
    scores = scores.double()
    total, left = (group_std(x, population).square().mean() for x in (scores, scores - values[:, -1].double()))
    return float(1 - left / total) if total > 0 else float("nan")


def _distances(rules: CreditRules, scores: Scores) -> Tensor | None:
    """How far samples are from the others of their group, (N,), by the score that the estimator's configuration names.

    Raises:
        UserError: No reward reports it, or it is below 0.
    """
    name = rules.estimator.config.diversity
    if name is None:
        return None
    key = rules.reward.component_of(name)
    reported = ", ".join(scores.components)
    check(key in scores.components, "advantages.diversity", name, f"one of what this run reports: {reported}")
    distances = scores.components[key]
    check(bool((distances >= 0).all()), "advantages.diversity", name, "a score that is at least 0, as a distance is")
    return distances


def _parts(reward: WeightedSum, scores: Scores, *, epoch: int) -> list[Part]:
    """Weight and raw scores of each reward that counts."""
    return [Part(weight, scores.components[name]) for name, weight in reward.weights(epoch).items() if weight]
