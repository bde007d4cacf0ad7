"""Puts rewards on a common scale by statistics of the scores seen so far.

    none            r
    std             r / std
    zscore          (r - mean) / std
    prompt_zscore   (r - mean_p) / std_p over the scores of prompt p alone, once there are 16; until then zscore

Dividing lets weights mean "share of the signal" whatever the unit of a reward (kB, cosine, probability). A mean that is
the same for all prompts cancels in the advantages; `zscore` subtracts it so that totals of several rewards read in
standard deviations. `prompt_zscore` gives every prompt the same say: an easy prompt, on which all scores are high and
close, is worth as much as a hard one.

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

MIN_COUNT = 16
_RELATIVE_FLOOR = 1e-6


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
class Normalizer:
    """One reward's running statistics, and the scores they make.

    Args:
        name: of the reward, for messages.
        kind: see the module docstring.
    """

    def __init__(self, name: str, kind: Normalization) -> None:
        self._name = name
        self._kind = kind
        self._all = Moments()
        self._prompts: dict[str, Moments] = {}

    @property
    def scale(self) -> float:
        """What scores are divided by at the moment, of prompts without statistics of their own; 1 for `none`."""
        return 1.0 if self._kind == "none" else self._all.scale

    def update(self, values: Tensor, prompts: Sequence[str] | None) -> None:
        """Takes scores `(B,)` of all processes and their prompts into the statistics."""
        self._all = self._all.including(values)
        if self._kind != "prompt_zscore":
            return
        rows: dict[str, list[int]] = {}
        for b, prompt in enumerate(self._needed(prompts)):
            rows.setdefault(prompt, []).append(b)
        for prompt, own in rows.items():
            self._prompts[prompt] = self._prompts.get(prompt, Moments()).including(values[own])

    def apply(self, values: Tensor, prompts: Sequence[str] | None, *, weight: float) -> Tensor:
        """`weight` times the normalised scores `(B,)`, by the statistics of the last `update`."""
        if self._kind == "zscore":
            return (values - self._all.mean) * (weight / self._all.scale)
        if self._kind != "prompt_zscore":
            return values * (weight / self.scale)
        chosen = [self._of(prompt) for prompt in self._needed(prompts)]
        means = torch.tensor([moments.mean for moments in chosen], dtype=torch.float64).to(values)
        factors = torch.tensor([weight / moments.scale for moments in chosen], dtype=torch.float64).to(values)
        return (values - means) * factors

    def state_dict(self) -> dict[str, object]:
        """Running moments, for JSON; restores exactly."""
        state: dict[str, object] = dict(vars(self._all))
        if self._kind == "prompt_zscore":
            state["prompts"] = {prompt: dict(vars(moments)) for prompt, moments in self._prompts.items()}
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continues from `state_dict()`."""
        self._all = _moments(state)
        saved = cast("Mapping[str, Mapping[str, object]]", state.get("prompts", {}))
        self._prompts = {prompt: _moments(entry) for prompt, entry in saved.items()}

    def _of(self, prompt: str) -> Moments:
        own = self._prompts.get(prompt)
        return own if own is not None and own.count >= MIN_COUNT else self._all

    def _needed(self, prompts: Sequence[str] | None) -> Sequence[str]:
        if prompts is None:
            raise ValueError(f"reward {self._name!r} is normalised per prompt; pass the prompts of its scores")
        return prompts


def _moments(state: Mapping[str, object]) -> Moments:
    count, mean, squares = (cast(float, state[key]) for key in ("count", "mean", "squares"))
    return Moments(count=int(count), mean=float(mean), squares=float(squares))
