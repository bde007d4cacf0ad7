"""How an image does against the others of its prompt: by the order of another reward, or by a judge of pairs.

    rank       score_i = mean_{j != i} [r_i > r_j] + [r_i = r_j] / 2     rank in the group over G - 1, ties averaged
               with temperature tau > 0: mean_{j != i} sigmoid((r_i - r_j) / tau)                     (Bradley & Terry)
    win_rate   score_i = mean_{j != i} (p(i beats j) + 1 - p(j beats i)) / 2

The rank is the share of pairwise comparisons that an image wins, 0 for the worst of its group and 1 for the best: it
keeps the order of a reward and drops its unit, its outliers and how hard the prompt is (Pref-GRPO, arXiv:2508.20751,
trains on win rates). With a temperature, differences much smaller than it count little. `win_rate` asks a judge that
compares two images; each pair is shown in both orders, which cancels a preference for the first. An image alone in its
group scores 1/2.

    rewards:
      - {name: rank, options: {reward: pickscore}}
      - {name: win_rate, options: {judge: "my_judge.py:prefers"}}

Legend: `G` images of the group, `P = G (G - 1)` ordered pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast, final

import torch
from torch import Tensor

from rewards.base import Metadata, UserError, total_and_parts
from rewards.card import Card, part_of
from rewards.loading import load_named
from rewards.registry import register, resolve

TIE = 1e-6  # of the larger score of a pair: differences of rounding are ties
PAIRS = 32  # that a judge is asked about in one call

AGAINST_OTHERS = (
    "an image is scored against the others of its prompt, which the gradient treats as fixed: the target is to beat "
    "what the policy makes now, and the mean stays 0.5 whatever is learnt"
)

Judge = Callable[[Tensor, Tensor, list[str], list[Metadata]], Tensor]


@register(
    "rank",
    groupwise=True,
    range=(0.0, 1.0),
    card=Card(
        origin="Mann-Whitney win rate; Bradley & Terry 1952 with a temperature",
        licence="definition",
        typical="0 worst of its prompt, 0.5 median, 1 best",
        caution=AGAINST_OTHERS,
        parts=lambda options: part_of(options.get("reward"), options.get("options")),
    ),
)
@final
class Rank:
    """Rank of another reward's score within the prompt's group, 0 worst, 1 best.

    Args:
        device: For a reward with weights.
        reward: Any name that `rewards.resolve` understands.
        options: Keyword arguments for its class.
        temperature: 0 for ranks; above, a difference of that size wins with probability 0.73.

    Raises:
        UserError: The reward is unknown, or the temperature negative.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        reward: str,
        options: Mapping[str, object] | None = None,
        temperature: float = 0.0,
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise UserError(f"reward 'rank': temperature must be at least 0 and finite, got {temperature}")
        self._reward = resolve(reward, device=device, options=options)
        self._temperature = temperature

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> dict[str, Tensor]:
        """Win rates `(G,)` within one group, and the raw scores they come from."""
        scores = self._reward(images, prompts, metadata, [0] * len(prompts)).total
        gaps = (scores[:, None] - scores[None, :]).double()
        sizes = scores.double().abs()
        gaps[gaps.abs() <= TIE * torch.maximum(sizes[:, None], sizes[None, :])] = 0.0
        wins = torch.sigmoid(gaps / self._temperature) if self._temperature else (gaps.sign() + 1) / 2
        return total_and_parts(mean_of_others(wins), {self._reward.name: scores})


@register(
    "win_rate",
    groupwise=True,
    range=(0.0, 1.0),
    card=Card(
        origin="pairwise preference, both orders averaged",
        licence="your judge's",
        typical="0.5 as good as the others",
        caution=AGAINST_OTHERS,
    ),
)
@final
class WinRate:
    """Share of the prompt's other images that a judge of pairs finds worse.

    Args:
        device: Unused; the judge is yours.
        judge: `file.py:name` of a function (first images, second images, prompts, metadata) -> probabilities that the
            first image of each pair is the better one; asked about at most 32 of the P pairs at a time.

    Raises:
        UserError: There is no such function.
    """

    def __init__(self, *, device: torch.device, judge: str) -> None:
        if ":" not in judge:
            raise UserError(f"reward 'win_rate': judge must be file.py:name or module:name, got {judge!r}")
        self._judge = cast(Judge, load_named(judge))
        self._name = judge

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Win rates `(G,)` within one group.

        Raises:
            UserError: The judge's answer is not a probability for every pair.
        """
        size = len(prompts)
        wins = torch.full((size, size), 0.5, dtype=torch.float64)
        pairs = (~torch.eye(size, dtype=torch.bool)).nonzero()
        for chunk in pairs.split(PAIRS) if size > 1 else ():
            first, second = chunk.unbind(1)
            texts, notes = [prompts[i] for i in first.tolist()], [metadata[i] for i in first.tolist()]
            wins[first, second] = self._ask(images[first], images[second], texts, notes)
        return mean_of_others((wins + 1 - wins.T) / 2)

    def _ask(self, first: Tensor, second: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        answer = self._judge(first, second, prompts, metadata)
        if not isinstance(answer, Tensor) or answer.shape != (len(prompts),):
            shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise UserError(f"the judge {self._name} must return a tensor ({len(prompts)},), got {shape}")
        answer = answer.detach().to("cpu", torch.float64)
        if not ((answer >= 0) & (answer <= 1)).all():
            raise UserError(f"the judge {self._name} must return probabilities in [0, 1], got {answer.tolist()}")
        return answer


def mean_of_others(wins: Tensor) -> Tensor:
    """Row means of `(G, G)` without the diagonal, `(G,)` float32; 1/2 for a group of one."""
    size = len(wins)
    if size == 1:
        return torch.full((1,), 0.5)
    return ((wins.sum(dim=1) - wins.diagonal()) / (size - 1)).float()
