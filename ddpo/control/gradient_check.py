"""Is the gradient that training follows the gradient of the objective? The best value per second of all checks.

Paths are drawn by the rollout that training uses, scored, turned into advantages and losses by the code that training
uses, and their Monte Carlo gradient is compared with the exact one of `ddpo.control.chain.objective`: parameter by
parameter, in units of its own standard error. z-scores of a correct estimator are standard normal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.control.toy_problem import ToyProblem
from ddpo.objectives import PolicyGradientConfig, policy_gradient
from ddpo.policy import Policy
from ddpo.rollout import rollout, sample_seeds
from ddpo.trajectory import Experience, Trajectory


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """Monte Carlo against exact, over the P parameters of the stochastic steps.

    Attributes:
        exact: Gradient of J, (P,).
        estimate: Mean of the Monte Carlo gradients, (P,).
        standard_error: Of that mean, (P,).
    """

    exact: Tensor
    estimate: Tensor
    standard_error: Tensor

    @property
    def z(self) -> Tensor:
        """(estimate - exact) / standard_error, (P,)."""
        return (self.estimate - self.exact) / self.standard_error

    @property
    def rms_z(self) -> float:
        """Root mean square of z; near 1 for a correct estimator."""
        return float(self.z.square().mean().sqrt())

    @property
    def max_z(self) -> float:
        """Largest |z|; for 200 parameters above 4.5 with probability .0014 for a correct estimator."""
        return float(self.z.abs().max())


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Paths of a policy at random weights, in independent chunks.

    Attributes:
        problem: What they were drawn for.
        policy: Whose weights they are.
        gain: Of the policy's head, (T, d, d).
        shift: Of the policy's head, (T, d).
        chunks: Trajectories with their KL.
        scores: Rewards of each chunk's samples, (B,).
    """

    problem: ToyProblem
    policy: Policy
    gain: Tensor
    shift: Tensor
    chunks: tuple[Trajectory, ...]
    scores: tuple[Tensor, ...]


def draw_paths(problem: ToyProblem, *, num_paths: int = 200_000, chunk_size: int = 2_000, seed: int = 0) -> Paths:
    """Draws the paths of a policy at random weights, away from both the pretrained and the optimal ones.

    Args:
        problem: The problem.
        num_paths: In all.
        chunk_size: Of the parts whose gradients are compared among themselves.
        seed: Of weights and paths.
    """
    policy = problem.policy()
    generator = torch.Generator().manual_seed(seed)
    weights = policy.trainable()
    with torch.no_grad():
        weights["head.gain"].copy_(0.2 * torch.randn(weights["head.gain"].shape, generator=generator))
        weights["head.shift"].copy_(0.3 * torch.randn(weights["head.shift"].shape, generator=generator))
    chunks, scores = [], []
    for start in range(0, num_paths, chunk_size):
        prompts = [""] * chunk_size
        seeds = sample_seeds(seed, 0, range(start, start + chunk_size))
        chunks.append(rollout(policy, policy.encode(prompts), seeds, with_kl=True))
        scores.append(problem.score(policy.decode(chunks[-1].final), prompts, []))
    return Paths(
        problem=problem,
        policy=policy,
        gain=weights["head.gain"].detach().double(),
        shift=weights["head.shift"].detach().double(),
        chunks=tuple(chunks),
        scores=tuple(scores),
    )


def compare_gradients(
    paths: Paths, config: PolicyGradientConfig, advantages: AdvantageConfig, *, alpha: float | None = None
) -> GradientComparison:
    """The Monte Carlo gradient of an objective at the weights that drew the paths, against the exact one.

    Args:
        paths: From `draw_paths`.
        config: The objective.
        advantages: How scores become advantages; `clip` must be None, since clipping is a bias. With `batch_std` each
            chunk's gradient is multiplied by the number that it was divided by.
        alpha: Weight of the KL; default the problem's.
    """
    assert advantages.clip is None, "a clip biases the gradient"
    alpha = paths.problem.alpha if alpha is None else alpha
    stochastic = torch.tensor(paths.policy.schedule.stochastic_steps)
    gain, shift = paths.gain.clone().requires_grad_(), paths.shift.clone().requires_grad_()
    exact = torch.autograd.grad(replace(paths.problem, alpha=alpha).value(gain, shift), (gain, shift))
    estimates = torch.stack(list(_estimates(paths, config, advantages, alpha)))
    return GradientComparison(
        exact=_flat(exact, stochastic),
        estimate=estimates.mean(0),
        standard_error=estimates.std(0) / len(estimates) ** 0.5,
    )


def _estimates(
    paths: Paths, config: PolicyGradientConfig, advantages: AdvantageConfig, alpha: float
) -> Iterator[Tensor]:
    """The gradient of J by each chunk alone, (P,) float64."""
    objective = policy_gradient(config)
    weights = paths.policy.trainable()
    parameters = [weights["head.gain"], weights["head.shift"]]
    for path, scores in zip(paths.chunks, paths.scores, strict=True):
        experience, scale = make_experience(path, scores, advantages, alpha)
        stochastic = torch.tensor(path.schedule.stochastic_steps)
        rows = torch.arange(len(scores)).repeat_interleave(len(stochastic))
        batch = experience.transitions(rows, stochastic.repeat(len(scores)), share=1.0)
        (loss,) = objective(paths.policy, batch)
        gradient = torch.autograd.grad(loss.value, parameters)
        # The loss is a mean over transitions divided by the dimensions: undo both, and the sign.
        yield -_flat(gradient, stochastic) * len(stochastic) * path.final[0].numel() * scale


def make_experience(
    path: Trajectory, scores: Tensor, config: AdvantageConfig, alpha: float, *, group_size: int = 8
) -> tuple[Experience, float]:
    """Scored trajectories as an objective takes them, and the number that `batch_std` divided them by (else 1)."""
    groups = torch.arange(len(scores)) // group_size
    prompts = path.condition.prompts
    estimator = AdvantageEstimator(config)
    advantages = estimator(scores, groups, prompts, kl=path.kl, alpha=alpha, num_steps=path.schedule.num_steps)
    experience = Experience(
        trajectory=path,
        scores=scores,
        advantages=advantages.values,
        kl_weight=advantages.kl_weight,
        groups=groups,
        penalised=alpha > 0,
    )
    return experience, float(scores.double().std(correction=0)) if config.scale == "batch_std" else 1.0


def _flat(gradients: Sequence[Tensor], steps: Tensor) -> Tensor:
    """Gradients of the given steps as one float64 vector."""
    return torch.cat([gradient[steps].double().flatten() for gradient in gradients])
