"""Puts rewards on a common scale by statistics of recent scores.

    none            r
    std             r / std
    zscore          (r - mean) / std
    prompt_zscore   (r - mean_p) / std_p by the n scores of prompt p that are remembered, with 16 scores' worth of all
                    prompts' statistics:    mean_p = (n m_p + 16 m) / (n + 16),
                    std_p^2 = (n (s_p^2 + (m_p - mean_p)^2) + 16 (s^2 + (m - mean_p)^2)) / (n + 16)

Dividing lets weights mean "share of the signal" whatever the unit of a reward (kB, cosine, probability). A mean that is
the same for all prompts cancels in the advantages; `zscore` subtracts it so that totals of several rewards read in
standard deviations. `prompt_zscore` gives every prompt the same say: an easy prompt, on which all scores are high and
close, is worth as much as a hard one. As a prompt becomes known its statistics go over from everyone's to its own. A
score that was taken into a prompt's statistics is left out of them when it is scored itself (`seen`): with it, the
signal would shrink by (n - 1) / n.

Every update keeps 0.9 of the weight of what was seen before, so that a scale is that of about ten epochs. Over all
epochs, a mean that moves would pass for spread: the scale would grow, and alpha would weigh more and more beside it.

Statistics change in `update` alone, with the scores of all processes; between two updates `apply` is a pure function,
hence the same on every process. Welford's recurrence in its batch form (Chan, Golub, LeVeque 1983), float64.

Legend: `B` batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from torch import Tensor

Normalization = Literal["none", "std", "zscore", "prompt_zscore"]

KEEP = 0.9  # of the weight of earlier scores, at every update
PRIOR = 16.0  # scores' worth of all prompts' statistics in those of one prompt
_RELATIVE_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Running moments of one reward's scores.

    Attributes:
        count: Weight of the scores seen, 1 each for those of the last update.
        mean: Their mean.
        squares: Sum of squared deviations from the mean.
    """

    count: float = 0.0
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

    def faded(self) -> Moments:
        """The same moments of less weight, as before an update."""
        return Moments(count=KEEP * self.count, mean=self.mean, squares=KEEP * self.squares)

    def mixed(self, other: Moments, weight: float) -> Moments:
        """Moments of these scores and of others as if those were `weight` many."""
        share = other.squares / other.count if other.count else 0.0
        count = self.count + weight
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * weight / count,
            squares=self.squares + weight * share + delta**2 * self.count * weight / count,
        )

    def without(self, value: float) -> Moments:
        """Moments of the scores seen but one of the last update; none of it is left where that was the only one."""
        count = self.count - 1
        if count <= _RELATIVE_FLOOR:
            return Moments()
        delta = value - self.mean
        squares = self.squares - delta**2 * self.count / count
        return Moments(count=count, mean=self.mean - delta / count, squares=max(0.0, squares))

    @property
    def std(self) -> float:
        """Standard deviation over all scores seen (divided by the count); 0 before any."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def varies(self) -> bool:
        """Whether the scores seen differ by more than rounding."""
        return self.std > _RELATIVE_FLOOR * abs(self.mean)

    @property
    def scale(self) -> float:
        """What scores are divided by: `std`, or 1 while all scores seen are equal to rounding."""
        return self.std if self.varies else 1.0


@final
class Normalizer:
    """One reward's running statistics, and the scores they make.

    Args:
        name: Of the reward, for messages.
        kind: See the module docstring.
    """

    def __init__(self, name: str, kind: Normalization) -> None:
        self._name = name
        self.kind = kind
        self._all = Moments()
        self._prompts: dict[str, Moments] = {}
        self._first: float | None = None

    @property
    def scale(self) -> float:
        """What scores are divided by at the moment, of prompts without statistics of their own; 1 for `none`."""
        return 1.0 if self.kind == "none" else self._all.scale

    @property
    def drift(self) -> float:
        """The scale over that of the first update whose scores differed; 1 before."""
        return 1.0 if self.kind == "none" or self._first is None else self._all.scale / self._first

    def update(self, values: Tensor, prompts: Sequence[str] | None) -> None:
        """Takes scores `(B,)` of all processes and their prompts into the statistics."""
        self._all = self._all.faded().including(values)
        if self._first is None and self._all.varies:
            self._first = self._all.scale
        if self.kind != "prompt_zscore":
            return
        rows: dict[str, list[int]] = {}
        for b, prompt in enumerate(self._needed(prompts)):
            rows.setdefault(prompt, []).append(b)
        for prompt, own in rows.items():
            self._prompts[prompt] = self._prompts.get(prompt, Moments()).faded().including(values[own])

    def apply(self, values: Tensor, prompts: Sequence[str] | None, *, weight: float, seen: bool = False) -> Tensor:
        """`weight` times the normalised scores `(B,)`, by the statistics of the last `update`.

        Args:
            values: raw scores.
            prompts: of the scores; needed by `prompt_zscore` alone.
            weight: factor.
            seen: whether the scores are those of the last update, each of which is then left out of its prompt's
                statistics.
        """
        if self.kind == "zscore":
            return (values - self._all.mean) * (weight / self._all.scale)
        if self.kind != "prompt_zscore":
            return values * (weight / self.scale)
        chosen = []
        for prompt, value in zip(self._needed(prompts), values.tolist(), strict=True):
            own = self._prompts.get(prompt, Moments())
            chosen.append((own.without(value) if seen else own).mixed(self._all, PRIOR))
        means = torch.tensor([moments.mean for moments in chosen], dtype=torch.float64).to(values)
        factors = torch.tensor([weight / moments.scale for moments in chosen], dtype=torch.float64).to(values)
        return (values - means) * factors

    def state_dict(self) -> dict[str, object]:
        """Running moments, for JSON; restores exactly."""
        state: dict[str, object] = {**vars(self._all), "first": self._first}
        if self.kind == "prompt_zscore":
            state["prompts"] = {prompt: dict(vars(moments)) for prompt, moments in self._prompts.items()}
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continues from `state_dict()`; one of before there was a first scale takes the saved scale for it."""
        self._all = _moments(state)
        self._first = cast("float | None", state.get("first", self._all.scale if self._all.varies else None))
        saved = cast("Mapping[str, Mapping[str, object]]", state.get("prompts", {}))
        self._prompts = {prompt: _moments(entry) for prompt, entry in saved.items()}

    def _needed(self, prompts: Sequence[str] | None) -> Sequence[str]:
        if prompts is None:
            raise ValueError(f"reward {self._name!r} is normalised per prompt; pass the prompts of its scores")
        return prompts


def _moments(state: Mapping[str, object]) -> Moments:
    count, mean, squares = (float(cast(float, state[key])) for key in ("count", "mean", "squares"))
    return Moments(count=count, mean=mean, squares=squares)
