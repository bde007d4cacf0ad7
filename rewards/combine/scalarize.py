"""Several rewards in one number where a weighted sum will not do.

    chebyshev    - max_j w_j (z_j - r_j) + rho sum_j w_j (r_j - z_j)      worst weighted shortfall from the ideals z
    geometric    prod_j u_j^(w_j / sum_i w_i),   u_j = (r_j - low_j) / (high_j - low_j) clamped to [0, 1]
    product      prod_j u_j^(w_j)
                 below a small share f of the range a power p goes on as the straight line f^(p-1) u to 0

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
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import cast, final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError, total_and_parts
from rewards.card import Card
from rewards.description import DescribedReward, Description
from rewards.frames import MIDDLE
from rewards.registry import register, resolve
from rewards.reward import Reward

Term = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One reward inside another.

    Attributes:
        name: As in `rewards:` of a configuration.
        weight: Positive.
        ideal: The score to reach, for chebyshev; the upper end of the reward's range when None.
        low: The score that counts as 0, for products; the lower end of the reward's range when None.
        high: The score that counts as 1, for products; the upper end of the range when None.
        options: Keyword arguments for a reward class.
    """

    name: str
    weight: float = 1.0
    ideal: float | None = None
    low: float | None = None
    high: float | None = None
    options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"weight must be a positive number, got {self.weight}; to minimise, use a sum")


@final
class Parts:
    """The rewards that make up another one, scored together.

    Args:
        owner: Name of the reward made of them, for messages.
        terms: Mappings with the fields of `Part`.
        device: For parts with weights.

    Raises:
        UserError: No terms, unknown or impossible fields, an unknown reward, or one named twice.
    """

    def __init__(self, owner: str, terms: Sequence[Term], *, device: torch.device) -> None:
        if not terms:
            raise UserError(f"reward {owner!r} needs at least one term; write terms: [{{name: ...}}]")
        self.parts = tuple(_part(owner, term) for term in terms)
        self.rewards: tuple[Reward, ...] = tuple(
            resolve(part.name, device=device, options=part.options) for part in self.parts
        )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise UserError(f"reward {owner!r}: the parts must be different rewards, got {', '.join(names)}")
        self.weights = torch.tensor([part.weight for part in self.parts])

    def describe(self) -> Description:
        """Differentiable if every part is, groupwise if some part is; of videos if some part is."""
        return Description(
            differentiable=all(reward.differentiable for reward in self.rewards),
            groupwise=any(reward.groupwise for reward in self.rewards),
            frames="all" if any(reward.frames != MIDDLE for reward in self.rewards) else MIDDLE,
        )

    def score(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Raw scores `(B,)` of each part, with its components; the graph is kept where gradients are on."""
        scored: dict[str, Tensor] = {}
        for reward in self.rewards:
            scores = reward.compute(images, prompts, metadata)
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
                raise UserError(f"reward {owner!r}: {reward.name} has no finite bound; give its term a number {key}")
            values.append(value)
        return torch.tensor(values)[:, None]


class Scalarisation(DescribedReward):
    """A reward made of others by a function of their scores.

    Args:
        owner: Name of the reward, for messages.
        terms: The parts, see `Part`.
        device: For parts with weights.
    """

    def __init__(self, owner: str, terms: Sequence[Term], *, device: torch.device) -> None:
        self.parts = Parts(owner, terms, device=device)

    @final
    def describe(self) -> Description:
        """As its parts are."""
        return self.parts.describe()

    @final
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """The score and its raw parts."""
        scored = self.parts.score(images, prompts, metadata)
        return total_and_parts(self.combine(self.parts.stack(scored)), scored)

    @abstractmethod
    def combine(self, scores: Tensor) -> Tensor:
        """Scores of the parts `(J, B)` to one, `(B,)`."""


@register(
    "chebyshev",
    differentiable=True,
    range=(-math.inf, math.inf),
    card=Card(
        origin="Bowman 1976; Steuer & Choo 1983", licence="definition", typical="0 when every part is at its ideal"
    ),
)
@final
class Chebyshev(Scalarisation):
    """Minus the worst weighted shortfall of several rewards from their ideals.

    Args:
        device: For parts with weights.
        terms: The parts: `name`, `weight`, `ideal`, `options`.
        augment: Rho, a small share of the sum of shortfalls that is added.
    """

    def __init__(self, *, device: torch.device, terms: Sequence[Term], augment: float = 0.0) -> None:
        if not (math.isfinite(augment) and augment >= 0):
            raise UserError(f"reward 'chebyshev': augment must not be negative, got {augment}")
        super().__init__("chebyshev", terms, device=device)
        self._ideal = self.parts.bounds("chebyshev", "ideal")
        self._augment = augment

    def combine(self, scores: Tensor) -> Tensor:
        """Minus the worst weighted shortfall, and a share of their sum."""
        shortfall = self.parts.weights.to(scores)[:, None] * (self._ideal.to(scores) - scores)
        return -shortfall.amax(dim=0) - self._augment * shortfall.sum(dim=0)


@register(
    "geometric",
    differentiable=True,
    range=(0.0, 1.0),
    card=Card(origin="weighted geometric mean", licence="definition", typical="0 when any part is at its lowest"),
)
@final
class Geometric(Scalarisation):
    """Weighted geometric mean, or product, of several rewards mapped to [0, 1].

    Args:
        device: For parts with weights.
        terms: The parts: `name`, `weight`, `low`, `high`, `options`.
        mean: Weights are divided by their sum; False gives the plain product of powers.
        floor: Below this share of its range a part counts by a straight line to 0, so that the slope stays finite.
    """

    def __init__(self, *, device: torch.device, terms: Sequence[Term], mean: bool = True, floor: float = 1e-4) -> None:
        if not 0 < floor < 1:
            raise UserError(f"reward 'geometric': floor must lie between 0 and 1, got {floor}")
        super().__init__("geometric", terms, device=device)
        self._low = self.parts.bounds("geometric", "low")
        self._span = self.parts.bounds("geometric", "high") - self._low
        if not (self._span > 0).all():
            raise UserError(f"reward 'geometric': every low must be below its high, got {terms}")
        weights = self.parts.weights
        self._powers = (weights / weights.sum() if mean else weights)[:, None]
        self._floor = floor

    def combine(self, scores: Tensor) -> Tensor:
        """Product of powers of each part's share of its range."""
        shares = ((scores - self._low.to(scores)) / self._span.to(scores)).clamp(0.0, 1.0)
        powers = self._powers.to(scores)
        straight = self._floor ** (powers - 1) * shares
        return torch.where(shares < self._floor, straight, shares.clamp(min=self._floor) ** powers).prod(dim=0)


def _part(owner: str, term: Term) -> Part:
    valid = [entry.name for entry in fields(Part)]
    unknown = [key for key in term if key not in valid] if isinstance(term, Mapping) else ["?"]
    if unknown or "name" not in term:
        raise UserError(
            f"reward {owner!r}: a term is a mapping with name and optionally {', '.join(valid[1:])}, got {term!r}"
        )
    numbers = {key: term[key] for key in ("weight", "ideal", "low", "high") if term.get(key) is not None}
    wrong = [key for key, value in numbers.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise UserError(f"reward {owner!r}: {wrong[0]} of {term['name']} must be a number, got {term[wrong[0]]!r}")
    try:
        return Part(
            name=str(term["name"]),
            options=dict(cast(Mapping[str, object], term.get("options") or {})),
            **cast("dict[str, float]", numbers),
        )
    except ValueError as error:
        raise UserError(f"reward {owner!r}: {term['name']}: {error}") from error
