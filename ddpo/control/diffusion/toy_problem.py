"""A fine-tuning problem on Gaussian data whose optimum is known: data, sampler, reward, and the weight of the KL.

The policy is an ordinary `ddpo.Policy` over a `ToyPipeline`; the exact side is the `AffineChain` that it realises.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ddpo.control.diffusion.chain import (
    AffineChain,
    Optimum,
    Quadratic,
    controlled,
    gaussian_data_chain,
    moved,
    objective,
    optimum,
    quadratic,
)
from ddpo.control.diffusion.grid_chain import GridChain, make_grid
from ddpo.control.diffusion.toy_heads import HeadKind, step_features
from ddpo.control.diffusion.toy_pipeline import from_pixels, toy_pipeline, toy_schedule, weight_of_x0
from ddpo.policy import Policy
from ddpo.sampling.samplers import SamplerConfig
from ddpo.sampling.schedule import Schedule
from ddpo.weights.adapter import FullConfig


@dataclass(frozen=True, kw_only=True)
class ToyProblem:
    """max E r(x_T) - alpha sum_k E KL_k over policies that start as the exact sampler of N(mean, cov).

    Attributes:
        mean: Of the data, (d,) float64.
        cov: Of the data, (d, d) float64.
        reward: r, quadratic or linear.
        alpha: Reward units per nat.
        sampler: DDIM or a flow sampler, with noise.
        head: What is trained: `affine`, weights for every step, or `shared`, the same for all steps.
        epoch: Which of the sampler's epochs, where its noisy steps change.
    """

    mean: Tensor
    cov: Tensor
    reward: Quadratic
    alpha: float
    sampler: SamplerConfig
    head: HeadKind = "affine"
    epoch: int = 0

    @cached_property
    def schedule(self) -> Schedule:
        """The coefficients of the epoch's chain, float64."""
        return toy_schedule(self.sampler, epoch=self.epoch)[1]

    @cached_property
    def reference(self) -> AffineChain:
        """The pretrained chain."""
        return gaussian_data_chain(self.mean, self.cov, self.schedule)

    @cached_property
    def optimum(self) -> Optimum:
        """The best policy with the sampler's noise."""
        return optimum(self.reference, self.reward, self.alpha)

    def policy(self) -> Policy:
        """A fresh pretrained policy with a head to train."""
        pipeline = toy_pipeline(torch.ones(1), self.mean[None], self.cov[None], self.sampler, head=self.head)
        policy = Policy(pipeline, sampler=self.sampler, adapter=FullConfig())
        return policy.at(policy.schedule_of(self.epoch, seed=0))

    def chain(self, gain: Tensor, shift: Tensor, *, noise_free_move: bool = True) -> AffineChain:
        """The chain of a policy whose head has these weights.

        Args:
            gain: (T, d, d), or (F, d, d) of a shared head.
            shift: (T, d), or (F, d).
            noise_free_move: Whether steps without noise are differentiated too. Without it the chain's gradient is
                what likelihood-ratio estimators see: that of the noisy steps, with the others as they are.
        """
        gain, shift = gain.double(), shift.double()
        if self.head != "shared":
            return controlled(self.reference, gain, shift)
        features = step_features(self.schedule.num_steps)
        gain, shift = torch.einsum("tf,fij->tij", features, gain), torch.einsum("tf,fi->ti", features, shift)
        if not noise_free_move:
            noisy = self.schedule.stochastic[:, None]
            gain = torch.where(noisy[..., None], gain, gain.detach())
            shift = torch.where(noisy, shift, shift.detach())
        theirs = list(self.schedule.pretrained_steps)
        gain, shift = (part.index_fill(0, torch.tensor(theirs, dtype=torch.int64), 0.0) for part in (gain, shift))
        return moved(self.reference, weight_of_x0(self.schedule) * self.schedule.s, gain, shift)

    def value(self, gain: Tensor, shift: Tensor, *, noise_free_move: bool = True) -> Tensor:
        """J of such a policy, exactly; arguments as for `chain`."""
        chain = self.chain(gain, shift, noise_free_move=noise_free_move)
        return objective(chain, self.reference, self.reward, self.alpha)

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> Tensor:
        """The reward as a reward function of images (B, 3, 1, d) that show the final states."""
        return self.reward(from_pixels(images.double())).float()


def truncated(problem: ToyProblem, num_steps: int) -> AffineChain:
    """What the gradient through the last `num_steps` steps alone converges to, where every step has its own weights.

    These are then the optimum's, as a step's best move depends on its state and on what comes after; the steps before
    stay pretrained.
    """
    best, reference = problem.optimum.chain, problem.reference
    kept = torch.arange(reference.num_steps) < reference.num_steps - num_steps
    return replace(
        reference,
        F=torch.where(kept[:, None, None], reference.F, best.F),
        g=torch.where(kept[:, None], reference.g, best.g),
    )


def toy_problem(
    dims: int = 4,
    *,
    kind: str = "quadratic",
    alpha: float = 0.5,
    sampler: SamplerConfig | None = None,
    head: HeadKind = "affine",
    epoch: int = 0,
    seed: int = 0,
) -> ToyProblem:
    """A random problem: correlated data of standard deviations near 0.6, a reward that pulls away from their mean.

    Args:
        dims: d.
        kind: `quadratic` or `linear` reward.
        alpha: Reward units per nat.
        sampler: Default 10 steps of DDIM with eta 1.
        head: What is trained.
        epoch: Which of the sampler's epochs, where its noisy steps change.
        seed: Of the random data and reward.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = 0.5 * randn(dims, dims) / dims**0.5
    curvature = randn(dims, dims) / dims**0.5
    P = curvature @ curvature.T + 0.5 * torch.eye(dims, dtype=torch.float64)
    return ToyProblem(
        mean=randn(dims),
        cov=factor @ factor.T + 0.2 * torch.eye(dims, dtype=torch.float64),
        reward=quadratic(P if kind == "quadratic" else torch.zeros_like(P), randn(dims)),
        alpha=alpha,
        sampler=sampler or SamplerConfig(num_steps=10, guidance_scale=1.0),
        head=head,
        epoch=epoch,
    )


@dataclass(frozen=True, kw_only=True)
class MixtureProblem:
    """The same on one-dimensional Gaussian-mixture data, where the optimum is not affine; solved on a grid.

    Attributes:
        weights: Of the components, (K,), summing to 1.
        means: (K,).
        stds: (K,).
        reward: r, of one dimension.
        alpha: Reward units per nat.
        sampler: DDIM or a flow sampler, with noise.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    reward: Quadratic
    alpha: float
    sampler: SamplerConfig

    def policy(self, *, head: HeadKind = "mlp", seed: int = 0) -> Policy:
        """A fresh pretrained policy with a small network to train."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = toy_pipeline(
                self.weights, self.means[:, None], self.stds.square()[:, None, None], self.sampler, head=head
            )
        return Policy(pipeline, sampler=self.sampler, adapter=FullConfig())

    @cached_property
    def chain(self) -> GridChain:
        """The exact problem."""
        std = toy_schedule(self.sampler)[1].std
        policy = self.policy()
        return GridChain(
            grid=make_grid(std),
            std=std,
            reference=lambda k, x: step_means(policy, k, x),
            reward=lambda x: self.reward(x[:, None]),
            alpha=self.alpha,
        )

    def value(self, policy: Policy) -> float:
        """J of a policy, exactly."""
        return self.chain.value(lambda k, x: step_means(policy, k, x))

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> Tensor:
        """The reward as a reward function of images (B, 3, 1, 1) that show the final states."""
        return self.reward(from_pixels(images.double())).float()


def mixture_problem(*, alpha: float = 0.5, num_steps: int = 10) -> MixtureProblem:
    """Two modes, and a reward that prefers the smaller one."""
    return MixtureProblem(
        weights=torch.tensor([0.7, 0.3], dtype=torch.float64),
        means=torch.tensor([-1.0, 1.2], dtype=torch.float64),
        stds=torch.tensor([0.4, 0.3], dtype=torch.float64),
        reward=quadratic(torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)),
        alpha=alpha,
        sampler=SamplerConfig(num_steps=num_steps, guidance_scale=1.0),
    )


@torch.no_grad()
def step_means(policy: Policy, k: int, x: Tensor) -> Tensor:
    """Means of step k at one-dimensional states (n,), as the policy computes them, (n,) float64."""
    condition = policy.encode([""] * len(x))
    return policy(k, x[:, None].float(), condition).mean[:, 0].double()
