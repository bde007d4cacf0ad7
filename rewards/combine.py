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
from dataclasses import dataclass, field, replace
from typing import ClassVar, final, get_args

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, Scores, check_inputs
from rewards.curriculum import WeightSchedule
from rewards.normalization import Moments, Normalization, Normalizer
from rewards.registry import resolve

__all__ = ["Moments", "Normalization", "RewardTerm", "WeightedSum"]

RESERVED = ("reward", "mean", "std", "images", "heldout", "ode", "kl")
"""What runs call measures of their own, or put before names; no reward can be reported so."""


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
        label: name to report under and to be called by constraints; null takes the reward's own. It tells two terms of
            one reward apart.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    weight: float = 1.0
    normalize: Normalization = "none"
    options: dict[str, object] = field(default_factory=dict)
    schedule: WeightSchedule | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError(f"name must be a reward's name, file.py:name or module:name, got {self.name!r}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight}")
        if self.normalize not in get_args(Normalization):
            kinds = ", ".join(map(repr, get_args(Normalization)))
            raise ValueError(f"normalize must be one of {kinds}, got {self.normalize!r}")
        if self.label is not None:
            check_label(self.label)

    @property
    def shown(self) -> str:
        """The label, else the name, or that of the reward which `remote` asks a server for."""
        served = self.options.get("reward") if self.name == "remote" else None
        return self.label or (served if isinstance(served, str) else self.name)

    @property
    def aliases(self) -> tuple[str, ...]:
        """What a constraint or a command may call this term by: the label alone where there is one."""
        return (self.name, self.name.rpartition(":")[2], self.shown) if self.label is None else (self.label,)

    def weight_at(self, epoch: int) -> float:
        """The weight after `epoch` finished epochs."""
        return self.weight if self.schedule is None else self.weight * self.schedule.at(epoch)


def check_label(label: str) -> None:
    """Raise ValueError unless a reward can be reported under this name."""
    if not label or any(letter.isspace() or letter in ":/=" for letter in label):
        raise ValueError(f"label must be a name without spaces, ':', '/' and '=', got {label!r}")
    if label in RESERVED:
        raise ValueError(
            f"label must not be one of {', '.join(RESERVED)}, which are a run's own measures, got {label!r}"
        )


def check_reported(names: Sequence[tuple[str, str]]) -> None:
    """Raise ValueError unless every term of a sum is reported under a name of its own.

    Args:
        names: of each term, what it is reported under and what the configuration calls its reward.
    """
    specs: dict[str, str] = {}
    for reported, spec in names:
        if reported in RESERVED:
            raise ValueError(
                f"reward {spec} cannot be reported as {reported!r}, which is a measure of a run's own (as are "
                f"{', '.join(name for name in RESERVED if name != reported)}); give its term a label, or register it "
                f"under another name: @register('my_{reported}')"
            )
        if reported in specs:
            raise ValueError(
                f"two reward terms report as {reported!r} ({specs[reported]} and {spec}); merge their weights, or give "
                f"one of them a label"
            )
        specs[reported] = spec


@final
class WeightedSum:
    """Callable like a reward; components are `<reward>` (raw) and `<reward>/<component>`.

    Attributes:
        terms: what is summed.
        rewards: the rewards of `terms`, under their labels.
        by_name: whether they were resolved from the terms' names.
        epoch: finished epochs, which set scheduled weights; whoever trains keeps it up to date.

    Args:
        terms: what to sum, at least one.
        device: for rewards with weights.
        rewards: the rewards of `terms`, already made; resolved from their names when left out.

    Raises:
        ValueError: no terms, an unknown reward, two terms that would report under the same name, or one under a name
            that runs use themselves.
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
        rewards = [replace(made, name=term.label or made.name) for term, made in zip(terms, rewards, strict=True)]
        check_reported([(reward.name, term.name) for term, reward in zip(terms, rewards, strict=True)])
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
        names = {
            alias: reward.name for term, reward in zip(self.terms, self.rewards, strict=True) for alias in term.aliases
        }
        return spec if spec in self._normalizers else names.get(spec, spec)

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
