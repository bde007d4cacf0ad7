"""Is the gradient that training follows the gradient of the objective? The best value per second of all checks.

Paths are drawn by the rollout that training uses, scored, turned into advantages and losses by the code that training
uses, and their Monte Carlo gradient is compared with the exact one of `ddpo.control.diffusion.chain.objective`:
parameter by parameter, in units of its own standard error. z-scores of a correct estimator are standard normal.

A likelihood ratio knows the steps that have noise. Where a step has none and the same weights make it, as in every real
network, J moves with the weights through that step too, and the estimator lacks E[dr/dx_T . dx_T/dw of that step]: it
is then held against the gradient that it can see, and what that one lacks is exact. `pathwise_gradients` differentiate
the chain itself, as objectives on differentiable rewards do, and see every step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpo.control.diffusion.toy_problem import ToyProblem
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator, Expected
from ddpo.objectives import Experience, Models, Objective, PolicyGradientConfig
from ddpo.objectives.base import Score
from ddpo.objectives.reward_gradient import RewardGradient, RewardGradientConfig
from ddpo.policy import Policy
from ddpo.rollout import rollout
from ddpo.seeds import GroupNoise, group_seeds
from ddpo.trajectory import Samples, Trajectory


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """Monte Carlo against exact, over P parameters: all, or of an affine head those of the stochastic steps.

    Attributes:
        exact: Gradient of J, (P,).
        visible: Gradient of J through the stochastic steps alone, with the others held as they are, (P,): what a
            likelihood-ratio estimator converges to. It is `exact` where no other step moves with the parameters.
        estimate: Mean of the Monte Carlo gradients, (P,).
        standard_error: Of that mean, (P,).
    """

    exact: Tensor
    visible: Tensor
    estimate: Tensor
    standard_error: Tensor

    @property
    def z(self) -> Tensor:
        """(estimate - exact) / standard_error, (P,)."""
        return (self.estimate - self.exact) / self.standard_error

    def against_visible(self) -> "GradientComparison":
        """The same, held against what the estimator converges to."""
        return replace(self, exact=self.visible)

    @property
    def rms_z(self) -> float:
        """Root mean square of z; near 1 for a correct estimator."""
        return float(self.z.square().mean().sqrt())

    @property
    def max_z(self) -> float:
        """Largest |z|; for 200 parameters above 4.5 with probability .0014 for a correct estimator."""
        return float(self.z.abs().max())


def length_and_cosine(gradient: Tensor, exact: Tensor) -> tuple[float, float]:
    """How long a gradient is in units of the exact one, and the cosine of the angle between the two."""
    length = float(gradient.norm() / exact.norm())
    return length, float(gradient @ exact / (gradient.norm() * exact.norm()))


def pooled(comparisons: Sequence[GradientComparison]) -> GradientComparison:
    """The mean over independent comparisons, such as those of epochs with different noisy steps."""
    count = len(comparisons)
    return GradientComparison(
        exact=torch.stack([one.exact for one in comparisons]).mean(0),
        visible=torch.stack([one.visible for one in comparisons]).mean(0),
        estimate=torch.stack([one.estimate for one in comparisons]).mean(0),
        standard_error=torch.stack([one.standard_error for one in comparisons]).square().sum(0).sqrt() / count,
    )


def joined(comparisons: Sequence[GradientComparison]) -> GradientComparison:
    """All parameters of independent comparisons, such as those at several weights.

    Where parameters act alike, the z-scores of one comparison go up together, and their mean square tells little; those
    of several comparisons do not.
    """
    return GradientComparison(
        exact=torch.cat([one.exact for one in comparisons]),
        visible=torch.cat([one.visible for one in comparisons]),
        estimate=torch.cat([one.estimate for one in comparisons]),
        standard_error=torch.cat([one.standard_error for one in comparisons]),
    )


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Paths of a policy at random weights, in independent chunks.

    Attributes:
        problem: What they were drawn for.
        policy: Whose weights they are.
        gain: Of the policy's head, (T, d, d), or (F, d, d) of a shared one.
        shift: Of the policy's head, (T, d) or (F, d).
        chunks: Trajectories with their KL.
        scores: Rewards of each chunk's samples, (B,).
        paired: Whether samples 2j and 2j + 1 have opposite noises.
    """

    problem: ToyProblem
    policy: Policy
    gain: Tensor
    shift: Tensor
    chunks: tuple[Trajectory, ...]
    scores: tuple[Tensor, ...]
    paired: bool = False


GROUP_SIZE = 8
Values = Callable[[Trajectory], Tensor]
"""What is expected at the states x_0 .. x_{T-1} of chains, (B, T) reward units."""


def draw_paths(
    problem: ToyProblem,
    *,
    num_paths: int = 200_000,
    chunk_size: int = 2_000,
    seed: int = 0,
    group_noise: GroupNoise = "independent",
) -> Paths:
    """Draws the paths of a policy at random weights, away from both the pretrained and the optimal ones.

    Args:
        problem: The problem.
        num_paths: In all.
        chunk_size: Of the parts whose gradients are compared among themselves.
        seed: Of the weights, and with the problem's epoch of the paths.
        group_noise: How the noises of groups of `GROUP_SIZE` belong together.
    """
    policy = problem.policy()
    generator = torch.Generator().manual_seed(seed)
    weights = policy.trainable()
    # Weights that every step has in common act T times.
    gain_size, shift_size = (0.2, 0.3) if problem.head == "affine" else (0.05, 0.1)
    with torch.no_grad():
        weights["head.gain"].copy_(gain_size * torch.randn(weights["head.gain"].shape, generator=generator))
        weights["head.shift"].copy_(shift_size * torch.randn(weights["head.shift"].shape, generator=generator))
    chunks, scores = [], []
    for start in range(0, num_paths, chunk_size):
        prompts = [""] * chunk_size
        places = range(start, start + chunk_size)
        seeds, priors = group_seeds(group_noise, seed, problem.epoch, places, group_size=GROUP_SIZE)
        states = policy.prior(priors)
        chunks.append(rollout(policy, policy.encode(prompts), seeds, with_kl=True, means=True, latents=states))
        scores.append(problem.score(policy.decode(chunks[-1].final), prompts, []))
    return Paths(
        problem=problem,
        policy=policy,
        gain=weights["head.gain"].detach().double(),
        shift=weights["head.shift"].detach().double(),
        chunks=tuple(chunks),
        scores=tuple(scores),
        paired=group_noise == "antithetic",
    )


def compare_gradients(
    paths: Paths,
    config: PolicyGradientConfig,
    advantages: AdvantageConfig,
    *,
    alpha: float | None = None,
    values: Values | None = None,
) -> GradientComparison:
    """The Monte Carlo gradient of an objective at the weights that drew the paths, against the exact one.

    Args:
        paths: From `draw_paths`.
        config: The objective.
        advantages: How scores become advantages; `clip` must be None, since clipping is a bias. With `batch_std` each
            chunk's gradient is multiplied by the number that it was divided by.
        alpha: Weight of the KL; default the problem's.
        values: A critic's, for the baseline `critic`.
    """
    assert advantages.clip is None, "a clip biases the gradient"
    alpha = paths.problem.alpha if alpha is None else alpha
    return _compared(paths, alpha, gradient_estimates(paths, config, advantages, alpha=alpha, values=values))


def pathwise_gradients(paths: Paths, config: RewardGradientConfig | None = None) -> GradientComparison:
    """The gradient by the chain rule through the paths' own noise, against the exact one.

    Args:
        paths: From `draw_paths`.
        config: The objective; default the whole chain.
    """
    return _compared(paths, paths.problem.alpha, _pathwise(paths, (config or RewardGradientConfig()).build()))


def _pathwise(paths: Paths, objective: RewardGradient) -> Iterator[Tensor]:
    """The gradient of J by each chunk alone, (P,) float64."""
    for path, scores in zip(paths.chunks, paths.scores, strict=True):
        experience, _ = make_experience(path, scores, AdvantageConfig(baseline="batch"), paths.problem.alpha)
        yield reward_gradient(paths.policy, experience, objective, paths.problem, rows=trained_rows(paths))


def reward_gradient(
    policy: Policy, experience: Experience, objective: RewardGradient, problem: ToyProblem, *, rows: Tensor
) -> Tensor:
    """The gradient of J that an objective finds through a problem's reward, by rows of the head, (P,) float64."""
    weights, samples = policy.trainable(), torch.arange(len(experience.samples))
    models = Models(policy=policy, score=_score(problem))
    batch = objective.gather(experience, samples, torch.zeros_like(samples), seed=0)
    loss = sum((loss.value for loss in objective.losses(models, batch)), start=torch.zeros(()))
    return -_flat(torch.autograd.grad(loss, [weights["head.gain"], weights["head.shift"]]), rows)


def _score(problem: ToyProblem) -> Score:
    """The problem's reward as objectives differentiate it."""
    return lambda images, *_: problem.score(images, [], [])


def _compared(paths: Paths, alpha: float, each: Iterator[Tensor]) -> GradientComparison:
    """Gradients of each chunk, (P,) each, against the exact ones."""
    rows = trained_rows(paths)
    gain, shift = paths.gain.clone().requires_grad_(), paths.shift.clone().requires_grad_()
    problem = replace(paths.problem, alpha=alpha)
    exact, visible = (
        _flat(torch.autograd.grad(problem.value(gain, shift, noise_free_move=move), (gain, shift)), rows)
        for move in (True, False)
    )
    estimates = torch.stack(list(each))
    return GradientComparison(
        exact=exact,
        visible=visible,
        estimate=estimates.mean(0),
        standard_error=estimates.std(0) / len(estimates) ** 0.5,
    )


def trained_rows(paths: Paths) -> Tensor:
    """Which rows of the head's weights do something: of an affine head those of the stochastic steps, else all."""
    if paths.problem.head == "affine":
        return torch.tensor(paths.policy.schedule.stochastic_steps)
    return torch.arange(len(paths.gain))


def gradient_estimates(
    paths: Paths,
    config: PolicyGradientConfig,
    advantages: AdvantageConfig,
    *,
    alpha: float,
    values: Values | None = None,
) -> Iterator[Tensor]:
    """The gradient of J by each chunk alone, (P,) float64; arguments as for `compare_gradients`."""
    for path, scores in zip(paths.chunks, paths.scores, strict=True):
        expected = None if values is None else values(path)
        experience, scale = make_experience(path, scores, advantages, alpha, paired=paths.paired, values=expected)
        rows = trained_rows(paths)
        yield objective_gradient(paths.policy, experience, config, rows=rows, score=_score(paths.problem)) * scale


def objective_gradient(
    policy: Policy, experience: Experience, config: PolicyGradientConfig, *, rows: Tensor, score: Score | None = None
) -> Tensor:
    """The gradient of J that an objective finds in an experience, by rows of the head's weights, (P,) float64."""
    objective: Objective[Any] = config.build()
    weights, steps = policy.trainable(), experience.decisions
    units = objective.demand.units(len(steps))
    samples = torch.arange(len(experience.advantages)).repeat_interleave(units)
    slots = torch.arange(units).repeat(len(experience.advantages))
    batch = objective.gather(experience, samples, slots, seed=0)
    losses = objective.losses(Models(policy=policy, score=score), batch)
    loss = sum((loss.value for loss in losses), start=torch.zeros(()))
    gradient = torch.autograd.grad(loss, [weights["head.gain"], weights["head.shift"]])
    # The loss is a mean over transitions divided by the dimensions: undo both, and the sign.
    return -_flat(gradient, rows) * len(steps) * experience.trajectory.final[0].numel()


def make_experience(
    path: Trajectory,
    scores: Tensor,
    config: AdvantageConfig,
    alpha: float,
    *,
    group_size: int = GROUP_SIZE,
    paired: bool = False,
    values: Tensor | None = None,
) -> tuple[Experience, float]:
    """Scored trajectories as an objective takes them, and the number that `batch_std` divided them by (else 1).

    With `values` (B, T) of a critic, for the baseline `critic`.
    """
    groups, pairs = (torch.arange(len(scores)) // size for size in (group_size, 2))
    estimator = AdvantageEstimator(config)
    advantages = estimator(
        scores,
        groups,
        [""] * len(scores),
        kl=path.kl,
        alpha=alpha,
        num_steps=path.schedule.num_steps,
        twins=pairs if paired else None,
        distances=None if config.diversity is None else nearest(path.final, group_size),
        expected=None if values is None else Expected(values=values, decisions=path.schedule.stochastic),
    )
    experience = Experience(
        samples=Samples(prompts=("",) * len(scores), metadata=({},) * len(scores), trajectory=path),
        start=0,
        scores=scores,
        advantages=advantages.values,
        kl_weight=advantages.kl_weight,
        groups=groups,
        penalised=alpha > 0,
        alpha=alpha,
        scale=advantages.scale,
    )
    return experience, float(scores.double().std(correction=0)) if config.scale == "batch_std" else 1.0


def nearest(states: Tensor, group_size: int) -> Tensor:
    """Distance of each state (B, d) to the nearest other of its group, (B,)."""
    each = states.reshape(-1, group_size, states.shape[1])
    distances = torch.cdist(each, each) + torch.diag(torch.full((group_size,), torch.inf))
    return distances.amin(2).flatten()


def _flat(gradients: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Gradients of the given rows as one float64 vector."""
    return torch.cat([gradient[rows].double().flatten() for gradient in gradients])
