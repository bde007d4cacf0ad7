"""A weighted sum of rewards, with every part reported.

    total_b = sum_j w_j · r_j(b) / scale_j
    scale_j = 1, or the running standard deviation of all scores of reward j so far

Dividing by the standard deviation lets weights mean "share of the signal" whatever the unit of a reward (kB, cosine,
probability). No mean is subtracted: a constant cancels in the advantages, and the total keeps its sign and zero. The
scale drifts with what has been seen, so totals of distant epochs are only comparable for `normalize="none"`; the raw
components always are.

Scales change in `update` alone, which the trainer calls once an epoch with the scores gathered from all processes;
between two updates `total` is a pure function, hence the same on every process. Per epoch:

    scores = reward(images, prompts, metadata)      on each process, components raw
    reward.update(gathered_components)              the same call on every process
    total = reward.total(gathered_components)

Welford's recurrence in its batch form (Chan, Golub, LeVeque 1983), float64. Legend: `B` batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, Scores, check_inputs
from rewards.registry import resolve

Normalization = Literal["none", "std"]

_RELATIVE_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward of a configuration.

    Attributes:
        name: registered name, `file.py:name` or `module:name`.
        weight: factor in the sum; negative to minimise.
        normalize: `std` divides the score by its running standard deviation, `none` leaves it in its own unit.
        options: keyword arguments for a reward class.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    weight: float = 1.0
    normalize: Normalization = "none"
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name must be a reward's name, file.py:name or module:name, got {self.name!r}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight}")
        if self.normalize not in get_args(Normalization):
            raise ValueError(f"normalize must be 'none' or 'std', got {self.normalize!r}")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Running moments of one reward's scores.

    Attributes:
        count: scores seen.
        mean: their mean.
        squares: sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, values: Tensor) -> Moments:
        """Moments of everything seen and `values` `(B,)` together."""
        added = values.detach().to("cpu", torch.float64).flatten()
        if added.numel() == 0:
            return self
        count = self.count + added.numel()
        added_mean = float(added.mean())
        delta = added_mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * added.numel() / count,
            squares=self.squares
            + float((added - added_mean).square().sum())
            + delta**2 * self.count * added.numel() / count,
        )

    @property
    def std(self) -> float:
        """Standard deviation over all scores seen (divided by the count); 0 before any."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def scale(self) -> float:
        """What scores are divided by: `std`, or 1 while all scores seen are equal to rounding."""
        return self.std if self.std > _RELATIVE_FLOOR * abs(self.mean) else 1.0


@final
class WeightedSum:
    """Callable like a reward; components are `<reward>` (raw) and `<reward>/<component>`.

    Args:
        terms: what to sum, at least one.
        device: for rewards with weights.
        rewards: the rewards of `terms`, already made; resolved from their names when left out.

    Raises:
        ValueError: no terms, an unknown reward, or two terms that would report under the same name.
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        *,
        device: torch.device | str = "cpu",
        rewards: Sequence[Reward] | None = None,
    ) -> None:
        if not terms:
            raise ValueError("at least one reward is needed, got none; add one under `rewards:`")
        if rewards is None:
            rewards = [resolve(term.name, device=device, options=term.options) for term in terms]
        if len(rewards) != len(terms):
            raise ValueError(f"one reward for each of the {len(terms)} terms is needed, got {len(rewards)}")
        specs: dict[str, str] = {}
        for term, reward in zip(terms, rewards, strict=True):
            if reward.name in specs:
                raise ValueError(
                    f"two reward terms report as {reward.name!r} ({specs[reward.name]} and {term.name}); merge their "
                    f"weights, or register one of them under another name"
                )
            specs[reward.name] = term.name
        self.terms = tuple(terms)
        self.rewards = tuple(rewards)
        self._moments = {reward.name: Moments() for reward in rewards}

    @classmethod
    def of(cls, *rewards: Reward) -> WeightedSum:
        """The plain sum of rewards made in Python."""
        return cls([RewardTerm(name=reward.name) for reward in rewards], rewards=rewards)

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images through every term."""
        return all(reward.differentiable for reward in self.rewards)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        """Score images without gradients; see `Reward.__call__`. The total uses the scales of the last `update`."""
        check_inputs(images, prompts, metadata)
        parts = [reward.score_checked(images, prompts, metadata) for reward in self.rewards]
        return self._assemble(parts)

    def differentiable_score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        """Score images with the graph kept; valid when every term is differentiable (`Reward.differentiable_score`)."""
        parts = [reward.differentiable_score(images, prompts, metadata) for reward in self.rewards]
        return self._assemble(parts)

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """The weighted, normalised sum `(B,)` of raw components, by the scales of the last `update`."""
        scaled = [
            components[reward.name] * (term.weight / self.scale(reward.name))
            for term, reward in zip(self.terms, self.rewards, strict=True)
        ]
        return torch.stack(scaled).sum(dim=0)

    def scale(self, name: str) -> float:
        """What scores of the reward `name` are divided by at the moment; 1 without normalisation."""
        normalize = next(term.normalize for term, reward in self._pairs() if reward.name == name)
        return self._moments[name].scale if normalize == "std" else 1.0

    def update(self, components: Mapping[str, Tensor]) -> None:
        """Take an epoch's raw scores, of all processes, into the running moments."""
        self._moments = {name: moments.including(components[name]) for name, moments in self._moments.items()}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Running moments by reward, for JSON; restores exactly."""
        return {
            name: {"count": moments.count, "mean": moments.mean, "squares": moments.squares}
            for name, moments in self._moments.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state belongs to other rewards.
        """
        if set(state) != set(self._moments):
            raise ValueError(
                f"the saved reward statistics are of {', '.join(sorted(state)) or 'nothing'}, this run's rewards are "
                f"{', '.join(sorted(self._moments))}; resume with the rewards the run was started with"
            )
        self._moments = {
            name: Moments(
                count=int(state[name]["count"]), mean=float(state[name]["mean"]), squares=float(state[name]["squares"])
            )
            for name in self._moments
        }

    def _pairs(self) -> list[tuple[RewardTerm, Reward]]:
        return list(zip(self.terms, self.rewards, strict=True))

    def _assemble(self, parts: Sequence[Scores]) -> Scores:
        components = {}
        for reward, part in zip(self.rewards, parts, strict=True):
            components[reward.name] = part.total
            components |= {f"{reward.name}/{name}": values for name, values in part.components.items()}
        return Scores(total=self.total(components), components=components)
