"""A weighted sum of rewards, with every part reported.

    total_b = sum_j w_j(e) · n_j(r_j(b))        w_j(e) = weight x schedule(epoch), see `rewards.curriculum`
                                                n_j    = identity or a running normalisation, `rewards.normalization`

With a normalisation the scale drifts with what has been seen, so totals of distant epochs are only comparable for
`normalize: none` and a constant weight; the raw components always are.

Statistics change in `update` alone, which the trainer calls once an epoch with the scores gathered from all processes;
between two updates `total` is a pure function, hence the same on every process. Per epoch:

    scores = reward(images, prompts, metadata)               on each process, components raw
    reward.update(gathered_components, prompts)              the same call on every process
    total = reward.total(gathered_components, prompts)

Legend: `B` batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final, get_args

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, Scores, check_inputs
from rewards.curriculum import WeightSchedule
from rewards.normalization import Moments, Normalization, Normalizer
from rewards.registry import resolve

__all__ = ["Moments", "Normalization", "RewardTerm", "WeightedSum"]


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward of a configuration.

    Attributes:
        name: registered name, `file.py:name` or `module:name`.
        weight: factor in the sum; negative to minimise.
        normalize: `std` divides the score by its running standard deviation, `zscore` also subtracts the running mean,
            `prompt_zscore` does so with each prompt's own mean and deviation; `none` leaves it in its own unit.
        options: keyword arguments for a reward class.
        schedule: course of the weight over the epochs, e.g. `{epochs: [0, 50], factors: [0, 1]}`; null keeps it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    weight: float = 1.0
    normalize: Normalization = "none"
    options: dict[str, object] = field(default_factory=dict)
    schedule: WeightSchedule | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name must be a reward's name, file.py:name or module:name, got {self.name!r}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight}")
        if self.normalize not in get_args(Normalization):
            kinds = ", ".join(map(repr, get_args(Normalization)))
            raise ValueError(f"normalize must be one of {kinds}, got {self.normalize!r}")

    def weight_at(self, epoch: int) -> float:
        """The weight after `epoch` finished epochs."""
        return self.weight if self.schedule is None else self.weight * self.schedule.at(epoch)


@final
class WeightedSum:
    """Callable like a reward; components are `<reward>` (raw) and `<reward>/<component>`.

    Attributes:
        terms: what is summed.
        rewards: the rewards of `terms`.
        by_name: whether they were resolved from the terms' names.
        epoch: finished epochs, which set scheduled weights; whoever trains keeps it up to date.

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
        self.by_name = rewards is None
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
        self.epoch = 0
        self._normalizers = {
            reward.name: Normalizer(reward.name, term.normalize) for term, reward in zip(terms, rewards, strict=True)
        }

    @classmethod
    def of(cls, *rewards: Reward) -> WeightedSum:
        """The plain sum of rewards made in Python."""
        return cls([RewardTerm(name=reward.name) for reward in rewards], rewards=rewards)

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images through every term."""
        return all(reward.differentiable for reward in self.rewards)

    @property
    def groupwise(self) -> bool:
        """Whether some term compares the images of a group, so that whole groups must be scored together."""
        return any(reward.groupwise for reward in self.rewards)

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
    ) -> Scores:
        """Score images without gradients; see `Reward.__call__`. The total uses the scales of the last `update`."""
        check_inputs(images, prompts, metadata)
        parts = [reward.score_checked(images, prompts, metadata, groups) for reward in self.rewards]
        return self._assemble(parts, prompts)

    def differentiable_score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
    ) -> Scores:
        """Score images with the graph kept; valid when every term is differentiable (`Reward.differentiable_score`)."""
        parts = [reward.differentiable_score(images, prompts, metadata, groups) for reward in self.rewards]
        return self._assemble(parts, prompts)

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str] | None = None) -> Tensor:
        """The weighted, normalised sum `(B,)` of raw components, by the scales of the last `update`.

        Args:
            components: raw scores by reward, each `(B,)`.
            prompts: `B` texts; may be None unless a term is normalised per prompt.
        """
        scaled = [
            self._normalizers[name].apply(components[name], prompts, weight=weight)
            for name, weight in self.weights().items()
        ]
        return torch.stack(scaled).sum(dim=0)

    def component_of(self, spec: str) -> str:
        """The name under which a reward is reported that a configuration calls `spec`; `spec` itself if it is none."""
        pairs = zip(self.terms, self.rewards, strict=True)
        return next((reward.name for term, reward in pairs if spec in (term.name, reward.name)), spec)

    def weights(self) -> dict[str, float]:
        """The weight of each reward at the present epoch, before normalisation."""
        return {reward.name: term.weight_at(self.epoch) for term, reward in zip(self.terms, self.rewards, strict=True)}

    def scale(self, name: str) -> float:
        """What scores of the reward `name` are divided by at the moment; 1 without normalisation."""
        return self._normalizers[name].scale

    def update(self, components: Mapping[str, Tensor], prompts: Sequence[str] | None = None) -> None:
        """Take an epoch's raw scores, of all processes, and their prompts into the running statistics."""
        for name, normalizer in self._normalizers.items():
            normalizer.update(components[name], prompts)

    def state_dict(self) -> dict[str, dict[str, object]]:
        """Running statistics by reward, for JSON; restores exactly."""
        return {name: normalizer.state_dict() for name, normalizer in self._normalizers.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state belongs to other rewards.
        """
        if set(state) != set(self._normalizers):
            raise ValueError(
                f"the saved reward statistics are of {', '.join(sorted(state)) or 'nothing'}, this run's rewards are "
                f"{', '.join(sorted(self._normalizers))}; resume with the rewards the run was started with"
            )
        for name, normalizer in self._normalizers.items():
            normalizer.load_state_dict(state[name])

    def _assemble(self, parts: Sequence[Scores], prompts: Sequence[str]) -> Scores:
        components = {}
        for reward, part in zip(self.rewards, parts, strict=True):
            components[reward.name] = part.total
            components |= {f"{reward.name}/{name}": values for name, values in part.components.items()}
        return Scores(total=self.total(components, prompts), components=components)
