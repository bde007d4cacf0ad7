"""From scores to advantages, per sample and step.

With alpha the KL weight and KL_j the step's KL at the sampled state, the return that follows the action of step k is

    R_k = r(x_0) - alpha * sum_{j > k} KL_j,

and the gradient of J = E[r] - alpha E[sum KL] is E[ sum_k grad log pi_k (R_k - b_k) ] - alpha E[ sum_k grad KL_k ]
for any baseline b_k that does not depend on the action. Baselines here leave the sample itself out of the mean (RLOO,
Kool et al. 2019): mean-including baselines shrink the first term by (G - 1) / G but not the second, i.e. raise alpha by
G / (G - 1), 14% for groups of 8.

Dividing by a standard deviation (GRPO, DDPO) divides the whole objective: rewards, cost-to-go and the direct KL term,
so that alpha stays in reward units per nat.

GDPO (arXiv:2601.05242) normalises each reward r_j by itself, sums, and normalises the sum over the batch:

    A_j = (r_j - mean_group r_j) / std_group r_j,    A = sum_j w_j A_j,    A <- (A - mean_batch A) / std_batch A

so that a reward of small spread is not drowned by one of large spread, and groups that agree in their sum but differ in
its parts get different advantages. The weights then speak of deviations, not of reward units, and so does alpha. The
group mean here leaves the sample itself out, a factor G / (G - 1) that the last division removes.

B samples, T steps, G samples a group.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ddpo.validation import check

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How scores become advantages.

    Attributes:
        baseline: `group` subtracts the mean over the other samples of the prompt in this batch (GRPO's groups, RLOO's
            mean); `prompt` a running mean over the other ones of the prompt's last `buffer_size` scores (DDPO), this
            batch's among them, as with `batch` until `min_count` are known; `batch` the mean over the other samples of
            the whole batch.
        scale: `std` divides by the standard deviation of the population of the baseline, `batch_std` by that of the
            whole batch, `none` does not divide. The KL weight is divided by the same number, so that alpha keeps its
            meaning (reward units per nat); with `std` prompts weigh the more the less their scores vary.
        clip: Advantages are clipped to [-clip, clip]; null for never.
        min_count: With `prompt`: scores a prompt needs before its own statistics are used.
        buffer_size: With `prompt`: scores remembered per prompt.
        combination: `sum` takes the advantage of the weighted sum of rewards. `gdpo` takes each reward's advantage by
            `baseline` and `scale`, sums them by weight, and normalises the sum over the batch; alpha is then in units
            of that sum per nat, and `normalize` of the rewards has no effect.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    baseline: Literal["group", "prompt", "batch"] = "group"
    scale: Literal["std", "batch_std", "none"] = "std"
    clip: float | None = 5.0
    min_count: int = 16
    buffer_size: int = 32
    combination: Literal["sum", "gdpo"] = "sum"

    def __post_init__(self) -> None:
        cure = "sum, or baseline group or batch: gdpo compares the samples of one epoch"
        check(self.combination == "sum" or self.baseline != "prompt", "combination", self.combination, cure)
        check(self.clip is None or self.clip > 0, "clip", self.clip, "positive or null")
        check(self.min_count >= 2, "min_count", self.min_count, "at least 2")
        check(self.buffer_size >= self.min_count, "buffer_size", self.buffer_size, "at least min_count")


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """What the objective needs of the scores.

    Attributes:
        values: (B, T).
        kl_weight: Weight of each sample's own per-step KL in the loss, alpha over the scale, (B,).
        zero_variance_groups: Groups whose scores are all equal; their samples carry no reward signal.
        clipped: Share of entries that the clip changed, in [0, 1].
    """

    values: Tensor
    kl_weight: Tensor
    zero_variance_groups: int
    clipped: float


class Part(NamedTuple):
    """One reward of several: its weight and raw scores (B,)."""

    weight: float
    scores: Tensor


class AdvantageEstimator:
    """Turns an epoch's scores into advantages; remembers scores per prompt where the baseline is `prompt`."""

    def __init__(self, config: AdvantageConfig) -> None:
        self.config = config
        self._history: dict[str, deque[float]] = {}

    def __call__(
        self,
        scores: Tensor,
        groups: Tensor,
        prompts: Sequence[str],
        *,
        kl: Tensor | None,
        alpha: float,
        num_steps: int,
        parts: Sequence[Part] = (),
        potential: Tensor | None = None,
    ) -> Advantages:
        """Advantages of an epoch, over all processes.

        Args:
            scores: Total rewards, (B,).
            groups: Group ids, (B,) int64.
            prompts: B texts.
            kl: Per-step KL at the sampled states, (B, T) nats; may be None where alpha is 0.
            alpha: Reward units per nat.
            num_steps: T.
            parts: The rewards that make up `scores`; needed by `gdpo` alone.
            potential: Shaping potential before each action, (B, T) reward units; see `ddpo.potential`.
        """
        assert kl is not None or alpha == 0.0, "the cost-to-go needs the KL of every step"
        scores = scores.double()
        batch = torch.zeros_like(groups)
        population = groups if self.config.baseline == "group" else batch
        cost = scores.new_zeros(len(scores), num_steps) if kl is None else cost_to_go(kl.double(), alpha)
        if potential is not None:
            cost = cost + potential.double()
        cost = leave_one_out(cost, population)
        if self.config.combination == "gdpo":
            centered, std = self._decoupled(parts, population, batch)
        elif self.config.baseline == "prompt":
            centered, std = self._running(scores, prompts, batch)
        else:
            centered, std = leave_one_out(scores, population), _std(scores, population)
        scale = std if self.config.combination == "gdpo" else self._scale(scores, batch, std)
        flat = scale <= _EPSILON
        scale = scale.masked_fill(flat, torch.inf)
        values = (centered[:, None] - cost) / scale[:, None]
        signal = centered if self.config.combination == "gdpo" else scores
        bound = torch.inf if self.config.clip is None else self.config.clip
        return Advantages(
            values=values.clamp(-bound, bound).float(),
            kl_weight=(alpha / scale).float(),
            zero_variance_groups=torch.unique(groups[_std(signal, groups) <= _EPSILON]).numel(),
            clipped=float((values.abs() > bound).double().mean()),
        )

    def _scale(self, scores: Tensor, batch: Tensor, std: Tensor) -> Tensor:
        """What scores are divided by, (B,), given the standard deviation of the baseline's population."""
        match self.config.scale:
            case "none":
                return torch.ones_like(scores)
            case "batch_std":
                return _std(scores, batch)
        return std

    def _decoupled(self, parts: Sequence[Part], population: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """GDPO: the weighted sum of each reward's own advantages, without its mean, and its batch std, (B,) each."""
        if not parts:
            raise ValueError("combination: gdpo needs the raw scores of each reward")
        total = torch.zeros(len(batch), dtype=torch.float64, device=batch.device)
        for weight, raw in parts:
            scores = raw.double()
            scale = self._scale(scores, batch, _std(scores, population))
            own = leave_one_out(scores, population) / scale.masked_fill(scale <= _EPSILON, torch.inf)
            total = total + weight * own
        return total - total.mean(), _std(total, batch)

    def _running(self, scores: Tensor, prompts: Sequence[str], batch: Tensor) -> tuple[Tensor, Tensor]:
        """Scores minus the mean of the others that are remembered of their prompt, and the std of all, (B,) each.

        DDPO's running mean has this epoch's scores, and the sample itself, in it.
        """
        for prompt, score in zip(prompts, scores.tolist(), strict=True):
            self._history.setdefault(prompt, deque(maxlen=self.config.buffer_size)).append(score)
        centered, std = leave_one_out(scores, batch), _std(scores, batch)
        later = Counter(prompts)
        for b, prompt in enumerate(prompts):
            later[prompt] -= 1
            own = scores.new_tensor(list(self._history[prompt]))
            if len(own) < self.config.min_count:
                continue
            remembered = later[prompt] < self.config.buffer_size  # else later samples pushed this one out
            others = len(own) / (len(own) - 1) if remembered else 1.0
            centered[b], std[b] = (scores[b] - own.mean()) * others, own.std(correction=0)
        return centered, std

    def state_dict(self) -> dict[str, list[float]]:
        """Remembered scores by prompt."""
        return {prompt: list(scores) for prompt, scores in self._history.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restores `state_dict`."""
        self._history = {prompt: deque(scores, maxlen=self.config.buffer_size) for prompt, scores in state.items()}


def cost_to_go(kl: Tensor, alpha: float) -> Tensor:
    """What the steps after k cost, alpha * sum_{j > k} KL_j, (B, T), in reward units."""
    from_here = kl.flip(1).cumsum(1).flip(1)
    return alpha * (from_here - kl)


def leave_one_out(values: Tensor, groups: Tensor) -> Tensor:
    """Each value minus the mean of the others of its group: (value - mean) * G / (G - 1), 0 in groups of one.

    Args:
        values: (B,) or (B, T).
        groups: (B,) int64.
    """
    _, member, count = torch.unique(groups, return_inverse=True, return_counts=True)
    size = count[member].to(values).reshape(-1, *[1] * (values.ndim - 1))
    return (values - _group_sum(values, groups) / size) * size / (size - 1).clamp(min=1)


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    ids, member = torch.unique(groups, return_inverse=True)
    return values.new_zeros(len(ids), *values.shape[1:]).index_add(0, member, values)[member]


def _std(scores: Tensor, groups: Tensor) -> Tensor:
    """Population standard deviation of each sample's group, (B,)."""
    size = _group_sum(torch.ones_like(scores), groups)
    deviation = scores - _group_sum(scores, groups) / size
    return (_group_sum(deviation.square(), groups) / size).sqrt()
