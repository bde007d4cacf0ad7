"""Several rewards in one number where a weighted sum will not do.

    chebyshev    - max_j w_j (z_j - r_j) + rho sum_j w_j (r_j - z_j)      worst weighted shortfall from the ideals z
    geometric    prod_j u_j^(w_j / sum_i w_i),   u_j = (r_j - low_j) / (high_j - low_j) clamped to [floor, 1]
    product      prod_j u_j^(w_j)

A weighted sum can only find Pareto optima on the convex hull of what is attainable, and lets a large gain in one reward
pay for the loss of another. Chebyshev (Bowman 1976; Steuer & Choo 1983 for the term with rho, which excludes weakly
optimal points) reaches every Pareto optimum for some weights and always pushes the worst one. The products are 0 as
soon as one reward is at its lowest: all must be good. Both are rewards of their own, made of others:

    rewards:
      - name: chebyshev
        options: {terms: [{name: ocr, ideal: 1}, {name: pickscore, ideal: 26, weight: 0.1}]}

Every part is reported raw. Legend: `B` batch, `J` parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import cast, final

import torch
from torch import Tensor

from rewards.base import Metadata, Reward, total_and_parts
from rewards.card import Card
from rewards.registry import register, resolve

Term = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One reward inside another.

    Attributes:
        name: as in `rewards:` of a configuration.
        weight: positive.
        ideal: the score to reach, for chebyshev; the upper end of the reward's range when None.
        low: the score that counts as 0, for products; the lower end of the reward's range when None.
        high: the score that counts as 1, for products; the upper end of the range when None.
        options: keyword arguments for a reward class.
    """

    name: str
    weight: float = 1.0
    ideal: float | None = None
    low: float | None = None
    high: float | None = None
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight must be a positive number, got {self.weight}; to minimise, use a sum")


@final
class Parts:
    """The rewards that make up another one, scored together.

    Args:
        owner: name of the reward made of them, for messages.
        terms: mappings with the fields of `Part`.
        device: for parts with weights.

    Raises:
        ValueError: no terms, unknown or impossible fields, an unknown reward, or one named twice.
    """

    def __init__(self, owner: str, terms: Sequence[Term], *, device: torch.device) -> None:
        if not terms:
            raise ValueError(f"reward {owner!r} needs at least one term; write terms: [{{name: ...}}]")
        self.parts = tuple(_part(owner, term) for term in terms)
        self.rewards: tuple[Reward, ...] = tuple(
            resolve(part.name, device=device, options=part.options) for part in self.parts
        )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"reward {owner!r}: the parts must be different rewards, got {', '.join(names)}")
        self.weights = torch.tensor([part.weight for part in self.parts])

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images through every part."""
        return all(reward.differentiable for reward in self.rewards)

    @property
    def groupwise(self) -> bool:
        """Whether some part compares the images of a group."""
        return any(reward.groupwise for reward in self.rewards)

    def score(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Raw scores `(B,)` of each part, with its components; the graph is kept where gradients are on."""
        scored: dict[str, Tensor] = {}
        for reward in self.rewards:
            score = reward.differentiable_score if torch.is_grad_enabled() else reward.score_checked
            scores = score(images, prompts, metadata)
            scored[reward.name] = scores.total
            scored |= {f"{reward.name}/{name}": values for name, values in scores.components.items()}
        return scored

    def stack(self, scored: Mapping[str, Tensor]) -> Tensor:
        """Scores of the parts alone, `(J, B)`."""
        first = scored[self.rewards[0].name]
        return torch.stack([scored[reward.name].to(first.device) for reward in self.rewards])

    def bounds(self, owner: str, key: str) -> Tensor:
        """`ideal`, `low` or `high` of each part, `(J, 1)`, from its range where not given."""
        side = 0 if key == "low" else 1
        values = []
        for part, reward in zip(self.parts, self.rewards, strict=True):
            given = cast("float | None", getattr(part, key))
            value = given if given is not None else (reward.range or (math.nan, math.nan))[side]
            if not math.isfinite(value):
                raise ValueError(f"reward {owner!r}: {reward.name} has no finite bound; give its term a number {key}")
            values.append(value)
        return torch.tensor(values)[:, None]


@register(
    "chebyshev",
    differentiable=True,
    range=(-math.inf, math.inf),
    card=Card(
        origin="Bowman 1976; Steuer & Choo 1983", licence="definition", typical="0 when every part is at its ideal"
    ),
)
@final
class Chebyshev:
    """Minus the worst weighted shortfall of several rewards from their ideals.

    Args:
        device: for parts with weights.
        terms: the parts: `name`, `weight`, `ideal`, `options`.
        augment: rho, a small share of the sum of shortfalls that is added.
    """

    def __init__(self, *, device: torch.device, terms: Sequence[Term], augment: float = 0.0) -> None:
        if not (math.isfinite(augment) and augment >= 0):
            raise ValueError(f"reward 'chebyshev': augment must not be negative, got {augment}")
        self._parts = Parts("chebyshev", terms, device=device)
        self._ideal = self._parts.bounds("chebyshev", "ideal")
        self._augment = augment

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images through every part."""
        return self._parts.differentiable

    @property
    def groupwise(self) -> bool:
        """Whether some part compares the images of a group."""
        return self._parts.groupwise

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """The score and its raw parts."""
        scored = self._parts.score(images, prompts, metadata)
        scores = self._parts.stack(scored)
        shortfall = self._parts.weights.to(scores)[:, None] * (self._ideal.to(scores) - scores)
        return total_and_parts(-shortfall.amax(dim=0) - self._augment * shortfall.sum(dim=0), scored)


@register(
    "geometric",
    differentiable=True,
    range=(0.0, 1.0),
    card=Card(origin="weighted geometric mean", licence="definition", typical="0 when any part is at its lowest"),
)
@final
class Geometric:
    """Weighted geometric mean, or product, of several rewards mapped to [0, 1].

    Args:
        device: for parts with weights.
        terms: the parts: `name`, `weight`, `low`, `high`, `options`.
        mean: weights are divided by their sum; False gives the plain product of powers.
        floor: parts are not taken below this share, so that the logarithm and its slope stay finite.
    """

    def __init__(self, *, device: torch.device, terms: Sequence[Term], mean: bool = True, floor: float = 1e-4) -> None:
        if not 0 < floor < 1:
            raise ValueError(f"reward 'geometric': floor must lie between 0 and 1, got {floor}")
        self._parts = Parts("geometric", terms, device=device)
        self._low = self._parts.bounds("geometric", "low")
        self._span = self._parts.bounds("geometric", "high") - self._low
        if not (self._span > 0).all():
            raise ValueError(f"reward 'geometric': every low must be below its high, got {terms}")
        weights = self._parts.weights
        self._powers = (weights / weights.sum() if mean else weights)[:, None]
        self._floor = floor

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the images through every part."""
        return self._parts.differentiable

    @property
    def groupwise(self) -> bool:
        """Whether some part compares the images of a group."""
        return self._parts.groupwise

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """The score and its raw parts."""
        scored = self._parts.score(images, prompts, metadata)
        scores = self._parts.stack(scored)
        shares = ((scores - self._low.to(scores)) / self._span.to(scores)).clamp(self._floor, 1.0)
        return total_and_parts((self._powers.to(scores) * shares.log()).sum(dim=0).exp(), scored)


def _part(owner: str, term: Term) -> Part:
    valid = [entry.name for entry in fields(Part)]
    unknown = [key for key in term if key not in valid] if isinstance(term, Mapping) else ["?"]
    if unknown or "name" not in term:
        raise ValueError(
            f"reward {owner!r}: a term is a mapping with name and optionally {', '.join(valid[1:])}, got {term!r}"
        )
    numbers = {key: term[key] for key in ("weight", "ideal", "low", "high") if term.get(key) is not None}
    wrong = [key for key, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise ValueError(f"reward {owner!r}: {wrong[0]} of {term['name']} must be a number, got {term[wrong[0]]!r}")
    try:
        return Part(
            name=str(term["name"]),
            options=dict(cast(Mapping[str, object], term.get("options") or {})),
            **cast("dict[str, float]", numbers),
        )
    except ValueError as error:
        raise ValueError(f"reward {owner!r}: {term['name']}: {error}") from error
