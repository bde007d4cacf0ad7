"""The kinds of steering as they are asked for: their numbers, how many particles they need, and which one is taken."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ddpo.sampling.schedule import Schedule
from ddpo.steering.base import Steer, Unsteered
from ddpo.steering.feynman_kac import FeynmanKac, Potential, Score
from ddpo.steering.particles import Resampling
from ddpo.steering.reward_gradient import RewardGradient, Through
from ddpo.steering.svdd import Svdd
from ddpo.validation import check


class Kind(Protocol):
    """A steering before it has a reward and a chain."""

    needs_noise: ClassVar[bool]
    needs_gradient: ClassVar[bool]

    @property
    def particles(self) -> int:
        """Chains of a sample."""
        ...

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The steering of a batch."""
        ...

    def log_weights(self, end: Steer, scores: Tensor) -> Tensor:
        """By which one particle of each sample is drawn, (G, P) float64, of their scores (G, P)."""
        ...


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The best of N plain samples; its KL to the sampler is at most log N - (N - 1) / N nats.

    Attributes:
        particles: N.
    """

    needs_noise: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    kind: Literal["best_of_n"] = "best_of_n"
    particles: int = 4

    def __post_init__(self) -> None:
        check(self.particles >= 1, "particles", self.particles, "at least 1")

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """No steering on the way."""
        return Unsteered()

    def log_weights(self, end: Steer, scores: Tensor) -> Tensor:
        """All weight on the best, the first of equals."""
        best = torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1])
        return torch.where(best > 0, 0.0, -math.inf).double()


@dataclass(frozen=True, kw_only=True)
class FeynmanKacKind:
    """See `ddpo.steering.feynman_kac`.

    Attributes:
        alpha: Reward units per nat, positive.
        particles: P.
        every: The particles are weighed every so many steps.
        potential: Which estimate on the way.
        resampling: How particles are resampled.
        threshold: Where the effective size is below this share of P, in (0, 1]; 1 for always.
    """

    needs_noise: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    kind: Literal["feynman_kac"] = "feynman_kac"
    alpha: float = 0.1
    particles: int = 4
    every: int = 5
    potential: Potential = "difference"
    resampling: Resampling = "systematic"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check(self.alpha > 0, "alpha", self.alpha, "positive")
        check(self.particles >= 1, "particles", self.particles, "at least 1")
        check(self.every >= 1, "every", self.every, "at least 1")
        check(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """Particles without weights; they are weighed before noisy steps only."""
        return FeynmanKac(
            score=score,
            alpha=self.alpha,
            particles=self.particles,
            steps=tuple(k for k in schedule.stochastic_steps if k > 0 and k % self.every == 0),
            potential=self.potential,
            resampling=self.resampling,
            threshold=self.threshold,
        )

    def log_weights(self, end: Steer, scores: Tensor) -> Tensor:
        """The particles' own."""
        assert isinstance(end, FeynmanKac)
        return end.log_weights()


@dataclass(frozen=True, kw_only=True)
class SvddKind:
    """See `ddpo.steering.svdd`.

    Attributes:
        alpha: Reward units per nat, positive.
        candidates: M for every next state.
    """

    needs_noise: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    particles: ClassVar[int] = 1
    kind: Literal["svdd"] = "svdd"
    alpha: float = 0.1
    candidates: int = 4

    def __post_init__(self) -> None:
        check(self.alpha > 0, "alpha", self.alpha, "positive")
        check(self.candidates >= 1, "candidates", self.candidates, "at least 1")

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return Svdd(score=score, alpha=self.alpha, candidates=self.candidates)

    def log_weights(self, end: Steer, scores: Tensor) -> Tensor:
        """There is one."""
        return torch.zeros_like(scores)


@dataclass(frozen=True, kw_only=True)
class RewardGradientKind:
    """See `ddpo.steering.reward_gradient`.

    Attributes:
        alpha: Reward units per nat, positive.
        through: What the gradient goes through.
    """

    needs_noise: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    particles: ClassVar[int] = 1
    kind: Literal["reward_gradient"] = "reward_gradient"
    alpha: float = 0.1
    through: Through = "network"

    def __post_init__(self) -> None:
        check(self.alpha > 0, "alpha", self.alpha, "positive")

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return RewardGradient(score=score, alpha=self.alpha, through=self.through)

    def log_weights(self, end: Steer, scores: Tensor) -> Tensor:
        """There is one."""
        return torch.zeros_like(scores)
