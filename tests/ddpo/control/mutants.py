"""Common mistakes in KL-regularised fine-tuning, and what each does: `python -m tests.ddpo.control.mutants`.

Each mutant is a patch of the real code, whose gradient is then held against the exact one; and, where the mutated
training converges, the exact gap (J* - J) / (J* - J_ref) of what it converges to, by a recursion of its own.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

import ddpo.credit.advantages as advantages_module
from ddpo.control.checks.gradient import REINFORCE
from ddpo.control.diffusion.chain import AffineChain, marginals, objective, optimum, relative_gap
from ddpo.control.diffusion.gradient_check import (
    GradientComparison,
    Paths,
    compare_gradients,
    draw_paths,
    pathwise_gradients,
)
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem, truncated
from ddpo.credit.advantage_scale import group_sum
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.objectives import PolicyGradientConfig
from ddpo.objectives.reward_gradient import RewardGradientConfig

Z_BAR = 4.0
objective_module = sys.modules["ddpo.objectives.policy_gradient"]  # the package exports a function of that name
PLAIN = AdvantageConfig(baseline="batch", scale="none", clip=None)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake.

    Attributes:
        name: What is wrong.
        seen_in: Where it is known from.
        patches: The mistake in our code: target and what takes its place.
        converged: The chain that training with the mistake converges to; None where it does not change that.
        objective: The objective whose gradient is checked.
        advantages: The advantages.
        pathwise: Whether it is a mistake of the reward's gradient by the chain rule, not of a likelihood ratio.
        check: The check of `ddpo verify` that flags it.
    """

    name: str
    seen_in: str
    patches: Callable[[], list]
    converged: Callable[[ToyProblem], AffineChain] | None = None
    objective: PolicyGradientConfig | RewardGradientConfig = REINFORCE
    advantages: AdvantageConfig = PLAIN
    pathwise: bool = False
    check: str = "gradient"


# ---- the mistakes as code --------------------------------------------------------------------------------------------


def scaled_alpha(factor):
    """The estimator sees another alpha than the one the user set."""

    def patches():
        real = AdvantageEstimator.__call__

        def call(self, scores, groups, prompts, *, alpha, **options):
            return real(self, scores, groups, prompts, alpha=alpha * factor(alpha), **options)

        return [patch.object(AdvantageEstimator, "__call__", call)]

    return patches


def no_future_kl():
    return [patch.object(advantages_module, "cost_to_go", lambda kl, alpha: torch.zeros_like(kl))]


def no_direct_kl():
    """Only the score-function part."""
    real = AdvantageEstimator.__call__

    def call(self, *arguments, **options):
        return replace(real(self, *arguments, **options), kl_weight=torch.zeros(len(arguments[0])))

    return [patch.object(AdvantageEstimator, "__call__", call)]


def unscaled_kl():
    """Rewards are divided by their std, the KL is not, and only its direct part is there."""
    real = AdvantageEstimator.__call__

    def call(self, scores, groups, prompts, *, kl, alpha, **options):
        found = real(self, scores, groups, prompts, kl=torch.zeros_like(kl), alpha=alpha, **options)
        return replace(found, kl_weight=torch.full((len(scores),), alpha))

    return [patch.object(AdvantageEstimator, "__call__", call)]


def baseline_includes_itself():
    def centered(values, groups, twins=None):
        _, member, count = torch.unique(groups, return_inverse=True, return_counts=True)
        size = count[member].to(values).reshape(-1, *[1] * (values.ndim - 1))
        return values - group_sum(values, groups) / size

    return [patch.object(advantages_module, "leave_one_out", centered)]


def half_ratio():
    real = objective_module.reinforce_loss

    def loss(log_ratio, advantages, **options):
        return real(0.5 * log_ratio, advantages, **options)

    return [patch.object(objective_module, "reinforce_loss", loss)]


# ---- where they converge ---------------------------------------------------------------------------------------------


def with_alpha(factor):
    return lambda problem: optimum(problem.reference, problem.reward, problem.alpha * factor(problem.alpha)).chain


def without_future_kl(problem, alpha=None):
    """Each step weighs its own KL against the reward alone, given what later steps do."""
    reference, alpha = problem.reference, problem.alpha if alpha is None else alpha
    value, F, g = problem.reward, [], []
    for k in reversed(range(reference.num_steps)):
        step_F, step_g = reference.F[k], reference.g[k]
        if reference.stochastic[k]:
            pull = torch.linalg.inv(alpha * torch.linalg.inv(reference.cov[k]) + value.P)
            move = torch.eye(len(step_g), dtype=torch.float64) - pull @ value.P
            step_F, step_g = move @ step_F, move @ step_g + pull @ value.q
        F.append(step_F)
        g.append(step_g)
        value = replace(value, P=step_F.T @ value.P @ step_F, q=step_F.T @ (value.q - value.P @ step_g))
    return replace(reference, F=torch.stack(F[::-1]), g=torch.stack(g[::-1]))


def divided_by_its_own_std(problem):
    """alpha grows by the std of the reward under the policy that it leads to."""
    chain = problem.reference
    for _ in range(200):
        means, covs = marginals(chain)
        P, q, mean, cov = problem.reward.P, problem.reward.q, means[-1], covs[-1]
        slope = q - P @ mean
        variance = 0.5 * torch.trace(P @ cov @ P @ cov) + slope @ cov @ slope
        chain = without_future_kl(problem, problem.alpha * float(variance.sqrt()))
    return chain


def last_steps(count):
    """The reward's gradient reaches the last steps only (DRaFT-K); the others stay pretrained."""
    return lambda problem: truncated(problem, count)


MUTANTS = (
    Mutant(name="future KL not in the return", seen_in="most", patches=no_future_kl, converged=without_future_kl),
    Mutant(name="KL only in the return, not direct", seen_in="DPOK without its second term", patches=no_direct_kl),
    Mutant(name="alpha 10% too large", seen_in="rounding", patches=scaled_alpha(lambda alpha: 1.1),
           converged=with_alpha(lambda alpha: 1.1), check="trainer"),
    Mutant(name="KL averaged over the T steps", seen_in="several", patches=scaled_alpha(lambda alpha: 0.1),
           converged=with_alpha(lambda alpha: 0.1)),
    Mutant(name="KL averaged over latent dimensions", seen_in="several", patches=scaled_alpha(lambda alpha: 0.25),
           converged=with_alpha(lambda alpha: 0.25)),
    Mutant(name="1/alpha for alpha", seen_in="two conventions mixed", patches=scaled_alpha(lambda alpha: alpha**-2),
           converged=with_alpha(lambda alpha: alpha**-2)),
    Mutant(name="advantage / std, KL unscaled, direct only", seen_in="flow_grpo", patches=unscaled_kl,
           converged=divided_by_its_own_std,
           advantages=AdvantageConfig(baseline="batch", scale="batch_std", clip=None)),
    Mutant(name="baseline includes the sample itself", seen_in="GRPO", patches=baseline_includes_itself,
           converged=with_alpha(lambda alpha: 8 / 7),
           advantages=AdvantageConfig(baseline="group", scale="none", clip=None)),
    Mutant(name="half the ratio", seen_in="log-prob over 2", patches=half_ratio),
    Mutant(name="reward gradient through the last 5 of 10 steps", seen_in="DRaFT-K", pathwise=True,
           patches=list, objective=RewardGradientConfig(last_steps=5), converged=last_steps(5)),
    Mutant(name="reward gradient through the last step", seen_in="DRaFT-1", pathwise=True,
           patches=list, objective=RewardGradientConfig(last_steps=1), converged=last_steps(1)),
)  # fmt: skip


@contextmanager
def applied(mutant: Mutant):
    """Our code with the mistake."""
    with ExitStack() as stack:
        for change in mutant.patches():
            stack.enter_context(change)
        yield


def exact_gap(mutant: Mutant, problem: ToyProblem) -> float | None:
    """The gap of the policy that the mistake converges to."""
    if mutant.converged is None:
        return None
    value = float(objective(mutant.converged(problem), problem.reference, problem.reward, problem.alpha))
    start = float(objective(problem.reference, problem.reference, problem.reward, problem.alpha))
    return relative_gap(value, problem.optimum.objective, start)


def gradient_of(mutant: Mutant, paths: Paths) -> GradientComparison:
    """The gradient check of the mutated code."""
    with applied(mutant):
        if mutant.pathwise:
            return pathwise_gradients(paths, mutant.objective)
        return compare_gradients(paths, mutant.objective, mutant.advantages)


def main() -> None:
    """Prints the table."""
    paths = draw_paths(toy_problem())
    print(f"{'mistake':<48}{'gap, quadratic r':>18}{'gap, linear r':>16}{'gradient rms z':>16}{'max':>7}  flagged by")
    for mutant in (None, *MUTANTS):
        if mutant is None:
            found = compare_gradients(paths, REINFORCE, PLAIN)
            print(f"{'(none)':<48}{0:>18.1e}{0:>16.1e}{found.rms_z:>16.2f}{found.max_z:>7.1f}")
            continue
        gaps = [exact_gap(mutant, toy_problem(kind=kind)) for kind in ("quadratic", "linear")]
        found = gradient_of(mutant, paths)
        text = "".join(
            f"{'' if gap is None else f'{gap:.1e}':>{width}}" for gap, width in zip(gaps, (18, 16), strict=True)
        )
        print(f"{mutant.name:<48}{text}{found.rms_z:>16.2f}{found.max_z:>7.1f}  {mutant.check}")


if __name__ == "__main__":
    main()
