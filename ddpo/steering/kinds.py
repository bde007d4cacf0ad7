"""The kinds of steering as they are asked for: their numbers, and how many particles they need."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from ddpo.sampling.schedule import Schedule
from ddpo.steering.base import Score, Steer
from ddpo.steering.best_of_n import Best
from ddpo.steering.feynman_kac import FeynmanKac, Potential
from ddpo.steering.langevin import Langevin
from ddpo.steering.particles import Resampling
from ddpo.steering.reward_gradient import RewardGradient, Through
from ddpo.steering.svdd import Svdd
from ddpo.validation import check


class Kind(Protocol):
    """A steering before it has a reward and a chain."""

    @property
    def kind(self) -> str:
        """Its name."""
        ...

    @property
    def particles(self) -> int:
        """Chains of a sample."""
        ...

    @property
    def passes(self) -> int:
        """Passes of the network a sample and step, at most."""
        ...

    @property
    def weighs(self) -> bool:
        """Whether its particles carry weights of the tilted law, which bounds may move (`ddpo.steering.projection`)."""
        ...

    @property
    def needs_noise(self) -> bool:
        """Whether it needs a sampler with noise."""
        ...

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs a reward with a gradient by its images."""
        ...

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The steering of a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The best of N plain samples (`ddpo.steering.best_of_n`).

    Attributes:
        particles: N.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    needs_noise: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    weighs: ClassVar[bool] = False

    kind: Literal["best_of_n"] = "best_of_n"
    particles: int = 4

    def __post_init__(self) -> None:
        check(self.particles >= 1, "particles", self.particles, "at least 1")

    @property
    def passes(self) -> int:
        """One for each of N."""
        return self.particles

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return Best()


@dataclass(frozen=True, kw_only=True)
class TiltKind:
    """What is common to the kinds that aim at the law p(x) exp(r(x) / alpha) / Z.

    Attributes:
        alpha: Reward units per nat, positive.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    needs_noise: ClassVar[bool] = True
    weighs: ClassVar[bool] = False

    alpha: float = 0.1

    def __post_init__(self) -> None:
        check(self.alpha > 0, "alpha", self.alpha, "positive")


@dataclass(frozen=True, kw_only=True)
class FeynmanKacKind(TiltKind):
    """Particles that the reward's estimates on the way multiply (`ddpo.steering.feynman_kac`).

    Attributes:
        alpha: Reward units per nat, positive.
        particles: P.
        every: The particles are weighed every so many steps.
        potential: Which estimate on the way.
        resampling: How particles are resampled.
        threshold: Where the effective size is below this share of P, in (0, 1]; 1 for always.
    """

    needs_gradient: ClassVar[bool] = False
    weighs: ClassVar[bool] = True

    kind: Literal["feynman_kac"] = "feynman_kac"
    particles: int = 4
    every: int = 5
    potential: Potential = "difference"
    resampling: Resampling = "systematic"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.particles >= 1, "particles", self.particles, "at least 1")
        check(self.every >= 1, "every", self.every, "at least 1")
        check(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")

    @property
    def passes(self) -> int:
        """One for each particle."""
        return self.particles

    def begin(self, score: Score, schedule: Schedule) -> FeynmanKac:
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


@dataclass(frozen=True, kw_only=True)
class SvddKind(TiltKind):
    """Next states chosen among candidates by the reward of what is predicted from them (`ddpo.steering.svdd`).

    Attributes:
        alpha: Reward units per nat, positive.
        candidates: M for every next state.
    """

    needs_gradient: ClassVar[bool] = False
    particles: ClassVar[int] = 1

    kind: Literal["svdd"] = "svdd"
    candidates: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.candidates >= 1, "candidates", self.candidates, "at least 1")

    @property
    def passes(self) -> int:
        """One for each candidate, which serves the next step too."""
        return self.candidates

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return Svdd(score=score, alpha=self.alpha, candidates=self.candidates)


@dataclass(frozen=True, kw_only=True)
class RewardGradientKind(TiltKind):
    """Means shifted up the gradient of the predicted image's reward (`ddpo.steering.reward_gradient`).

    Attributes:
        alpha: Reward units per nat, positive.
        through: What the gradient goes through.
    """

    needs_gradient: ClassVar[bool] = True
    particles: ClassVar[int] = 1

    kind: Literal["reward_gradient"] = "reward_gradient"
    through: Through = "network"

    @property
    def passes(self) -> int:
        """That of the step, and one to differentiate."""
        return 2 if self.through == "network" else 1

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return RewardGradient(score=score, alpha=self.alpha, through=self.through)


@dataclass(frozen=True, kw_only=True)
class LangevinKind:
    """Langevin corrections after every step, with or without the reward (`ddpo.steering.langevin`).

    Attributes:
        alpha: Reward units per nat, positive; null to leave the reward out.
        corrections: After every step but the last.
        step: Size of each, in units of the squared noise level, in (0, 2); null for the published one.
        ratio: Of noise to drift in the published size.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    needs_noise: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    particles: ClassVar[int] = 1

    kind: Literal["langevin"] = "langevin"
    alpha: float | None = 0.1
    corrections: int = 1
    step: float | None = 0.05
    ratio: float = 0.16

    def __post_init__(self) -> None:
        check(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "positive or null")
        check(self.corrections >= 1, "corrections", self.corrections, "at least 1")
        check(self.step is None or 0 < self.step < 2, "step", self.step, "in (0, 2) or null (beyond 2 it diverges)")
        check(self.ratio > 0, "ratio", self.ratio, "positive")

    @property
    def needs_gradient(self) -> bool:
        """Where the reward takes part."""
        return self.alpha is not None

    @property
    def passes(self) -> int:
        """That of the step, and one for each correction."""
        return 1 + self.corrections

    def begin(self, score: Score, schedule: Schedule) -> Steer:
        """The same for every batch."""
        return Langevin(score=score, alpha=self.alpha, corrections=self.corrections, step=self.step, ratio=self.ratio)
