"""A weighted sum of rewards, with every part reported.

    total_b = sum_j w_j(e) · n_j(r_j(b)) · d    w_j(e) = weight x schedule(epoch e), see `rewards.combine.curriculum`
                                                n_j    = identity or a running normalisation, see `.normalization`
    d = 1 where a weighted reward is in its own unit, else the mean of s_j(e) / s_j(first epoch), weighted by |w_j|

A running scale s_j follows the recent scores. The factor d keeps the unit of the total, and with it what alpha, a
constraint's multiplier and a shaping potential mean: where every reward is divided, the standard deviations of the
first epoch. So one normalised reward is divided by one number throughout, and several change their shares alone. Totals
of evaluations are compared by one set of scales (`scaled_by`); raw components always can be.

Statistics change in `update` alone, which the trainer calls once an epoch with the scores gathered from all processes;
between two updates `total` is a pure function, hence the same on every process. Per epoch:

    components = reward.components(images, prompts, metadata)        raw, on each process
    reward.update(gathered, prompts)                                 the same call on every process
    total = reward.total(gathered, prompts, epoch=epoch)

Legend: `B` batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, final, get_args

import torch
from torch import Tensor

from rewards.base import Metadata, Scores, UserError
from rewards.combine.curriculum import WeightSchedule
from rewards.combine.normalization import Moments, Normalization, Normalizer
from rewards.frames import MIDDLE
from rewards.registry import resolve
from rewards.reward import Reward

__all__ = ["Moments", "Normalization", "RewardTerm", "WeightedSum"]

RESERVED = ("reward", "mean", "std", "images", "heldout", "ode", "kl")
"""What runs call measures of their own, or put before names; no reward can be reported so."""


@dataclass(frozen=True, kw_only=True)
class RewardTerm:
    """One reward of a configuration.

    Attributes:
        name: Registered name, `file.py:name` or `module:name`.
        weight: Factor in the sum; negative to minimise.
        normalize: `std` divides the score by the standard deviation of recent epochs, `zscore` also subtracts their
            mean, `prompt_zscore` does so with each prompt's own mean and deviation; `none` leaves it in its own unit.
            The unit of the sum stays what it was in the first epoch.
        options: Keyword arguments for a reward class.
        schedule: Course of the weight over the epochs, e.g. `{epochs: [0, 50], factors: [0, 1]}`; null keeps it.
        label: Name to report under and to be called by constraints; null takes the reward's own. It tells two terms of
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
            raise UserError(f"name must be a reward's name, file.py:name or module:name, got {self.name!r}")
        if not math.isfinite(self.weight):
            raise UserError(f"weight must be a finite number, got {self.weight}")
        if self.normalize not in get_args(Normalization):
            kinds = ", ".join(map(repr, get_args(Normalization)))
            raise UserError(f"normalize must be one of {kinds}, got {self.normalize!r}")
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
    """Raises ValueError unless a reward can be reported under this name."""
    if not label or any(letter.isspace() or letter in ":/=" for letter in label):
        raise UserError(f"label must be a name without spaces, ':', '/' and '=', got {label!r}")
    if label in RESERVED:
        raise UserError(
            f"label must not be one of {', '.join(RESERVED)}, which are a run's own measures, got {label!r}"
        )


def check_reported(names: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError unless every term of a sum is reported under a name of its own.

    Args:
        names: Of each term, what it is reported under and what the configuration calls its reward.
    """
    specs: dict[str, str] = {}
    for reported, spec in names:
        if reported in RESERVED:
            raise UserError(
                f"reward {spec} cannot be reported as {reported!r}, which is a measure of a run's own (as are "
                f"{', '.join(name for name in RESERVED if name != reported)}); give its term a label, or register it "
                f"under another name: @register('my_{reported}')"
            )
        if reported in specs:
            raise UserError(
                f"two reward terms report as {reported!r} ({specs[reported]} and {spec}); merge their weights, or give "
                f"one of them a label"
            )
        specs[reported] = spec


@final
class WeightedSum:
    """Several rewards as one; components are `<reward>` (raw) and `<reward>/<component>`.

    Attributes:
        terms: What is summed.
        rewards: The rewards of `terms`, under their labels.
        by_name: Whether they were resolved from the terms' names.

    Args:
        terms: What to sum, at least one; none only where `rewards` is given as empty too.
        device: For rewards with weights.
        rewards: The rewards of `terms`, already made; resolved from their names when left out.

    Raises:
        UserError: No terms, an unknown reward, two terms that would report under the same name, or one under a name
            that runs use themselves.
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        *,
        device: torch.device | str = "cpu",
        rewards: Sequence[Reward] | None = None,
    ) -> None:
        if not terms and rewards is None:
            raise UserError("at least one reward is needed, got none; add one under `rewards:`")
        self.by_name = rewards is None
        if rewards is None:
            rewards = [resolve(term.name, device=device, options=term.options) for term in terms]
        if len(rewards) != len(terms):
            raise ValueError(f"one reward for each of the {len(terms)} terms is needed, got {len(rewards)}")
        rewards = [replace(made, name=term.label or made.name) for term, made in zip(terms, rewards, strict=True)]
        check_reported([(reward.name, term.name) for term, reward in zip(terms, rewards, strict=True)])
        self.terms = tuple(terms)
        self.rewards = tuple(rewards)
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
    def with_gradient(self) -> tuple[str, ...]:
        """The rewards that have a weight and derivatives: what `gradient_total` adds up."""
        return tuple(name for name, reward in self._weighed() if reward.differentiable)

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """The rewards that have a weight and no derivatives."""
        return tuple(name for name, reward in self._weighed() if not reward.differentiable)

    def _weighed(self) -> list[tuple[str, Reward]]:
        pairs = zip(self.terms, self.rewards, strict=True)
        return [(reward.name, reward) for term, reward in pairs if term.weight]

    @property
    def groupwise(self) -> bool:
        """Whether some term compares the images of a group, so that whole groups must be scored together."""
        return any(reward.groupwise for reward in self.rewards)

    @property
    def scores_videos(self) -> bool:
        """Whether some term is given more of a video than its middle frame."""
        return any(reward.frames != MIDDLE for reward in self.rewards)

    def components(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
        *,
        gradient: bool = False,
    ) -> dict[str, Tensor]:
        """The raw scores `(B,)` of every reward and of its components, without weight or scale.

        Args:
            images: `(B, 3, H, W)`, or `(B, F, 3, H, W)`, floating point in [0, 1].
            prompts: The `B` prompts.
            metadata: `B` dictionaries.
            groups: `B` ids, equal for images that a groupwise reward compares; by equal prompts when None.
            gradient: Whether to keep the graph, which needs every term to be differentiable; as for `Reward`.

        Raises:
            ValueError: The inputs are not images with a prompt and metadata each, or there is no gradient to be had.
            RewardError: A reward raised, or its result is not one finite number per image.
        """
        scored = {}
        for reward in self.rewards:
            own = reward(images, prompts, metadata, groups, gradient=gradient)
            scored[reward.name] = own.total
            scored |= {f"{reward.name}/{name}": values for name, values in own.components.items()}
        return scored

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
        *,
        epoch: int = 0,
        gradient: bool = False,
    ) -> Scores:
        """The raw `components` of some images and their `total` at an epoch, by the scales of the last `update`."""
        scored = self.components(images, prompts, metadata, groups, gradient=gradient)
        return Scores(total=self.total(scored, prompts, epoch=epoch), components=scored)

    def total(
        self,
        components: Mapping[str, Tensor],
        prompts: Sequence[str] | None = None,
        *,
        epoch: int,
        seen: bool = False,
        compared: bool = False,
    ) -> Tensor:
        """The weighted, normalised sum `(B,)` of raw components, by the scales of the last `update`.

        Args:
            components: Raw scores by reward, each `(B,)`.
            prompts: `B` texts; may be None unless a term is normalised per prompt.
            epoch: Finished epochs, which set scheduled weights.
            seen: Whether these are the scores of the last `update` (`Normalizer.apply`).
            compared: Whether to sum only the terms that compare the images of a group; 0 where there are none.

        A sum of no rewards is NaN.
        """
        if not self.rewards:
            return torch.full((len(prompts or ()),), math.nan)
        weights = self.weights(epoch)
        drift = self._drift(weights)
        scaled = [
            self._normalizers[name].apply(components[name], prompts, weight=weight * drift, seen=seen)
            for name, weight in weights.items()
            if self.compares(name) or not compared
        ]
        first = components[self.rewards[0].name]
        return torch.stack(scaled).sum(dim=0) if scaled else torch.zeros_like(first)

    def gradient_total(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        *,
        epoch: int,
        watch: Callable[[str, Tensor], None],
    ) -> Tensor:
        """The part of the total `(B,)` that has derivatives, with its graph and in the total's unit.

        Scales are constants, those of the last `update`, which has seen the scores of these images.

        Args:
            images: `(B, 3, H, W)`, or `(B, F, 3, H, W)`, floating point in [0, 1].
            prompts: The `B` prompts.
            metadata: `B` dictionaries.
            epoch: Finished epochs, which set scheduled weights.
            watch: Told a reward's name and the total's gradient by the images through it alone, in the backward pass.

        Raises:
            RewardError: As for `Reward`.
        """
        weights = self.weights(epoch)
        drift, total = self._drift(weights), images.new_zeros(len(images))
        for name, reward in self._weighed():
            if not (reward.differentiable and weights[name]):
                continue
            own = images.view_as(images)
            if own.requires_grad:
                own.register_hook(partial(watch, name))
            scores = reward(own, prompts, metadata, gradient=True).total.to(images.device)
            total = total + self._normalizers[name].apply(scores, prompts, weight=weights[name] * drift, seen=True)
        return total

    def compares(self, component: str) -> bool:
        """Whether a component is of a reward that compares the images of a group."""
        owners = [one.name for one in self.rewards if one.groupwise]
        return any(component == owner or component.startswith(f"{owner}/") for owner in owners)

    def scaled_by(self, components: Mapping[str, Tensor], prompts: Sequence[str] | None = None) -> WeightedSum:
        """The same sum with the scales of these raw scores `(B,)` alone."""
        fixed = WeightedSum(self.terms, rewards=self.rewards)
        fixed.update(components, prompts)
        return fixed

    def component_of(self, spec: str) -> str:
        """The name under which a reward is reported that a configuration calls `spec`; `spec` itself if it is none."""
        names = {
            alias: reward.name for term, reward in zip(self.terms, self.rewards, strict=True) for alias in term.aliases
        }
        return spec if spec in self._normalizers else names.get(spec, spec)

    def weights(self, epoch: int) -> dict[str, float]:
        """The weight of each reward after `epoch` finished epochs, before normalisation."""
        return {reward.name: term.weight_at(epoch) for term, reward in zip(self.terms, self.rewards, strict=True)}

    def scale(self, name: str) -> float:
        """What scores of the reward `name` are divided by at the moment; 1 without normalisation."""
        return self._normalizers[name].scale

    def _drift(self, weights: Mapping[str, float]) -> float:
        """The factor d of the module docstring."""
        sizes = {name: abs(weight) for name, weight in weights.items() if weight}
        if not sizes or any(self._normalizers[name].kind == "none" for name in sizes):
            return 1.0
        return sum(size * self._normalizers[name].drift for name, size in sizes.items()) / sum(sizes.values())

    def update(self, components: Mapping[str, Tensor], prompts: Sequence[str] | None = None) -> None:
        """Takes an epoch's raw scores, of all processes, and their prompts into the running statistics."""
        for name, normalizer in self._normalizers.items():
            normalizer.update(components[name], prompts)

    def state_dict(self) -> dict[str, dict[str, object]]:
        """Running statistics by reward, for JSON; restores exactly."""
        return {name: normalizer.state_dict() for name, normalizer in self._normalizers.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Continues from `state_dict()`.

        Raises:
            UserError: The state belongs to other rewards.
        """
        if set(state) != set(self._normalizers):
            raise UserError(
                f"the saved reward statistics are of {', '.join(sorted(state)) or 'nothing'}, this run's rewards are "
                f"{', '.join(sorted(self._normalizers))}; resume with the rewards the run was started with"
            )
        for name, normalizer in self._normalizers.items():
            normalizer.load_state_dict(state[name])
