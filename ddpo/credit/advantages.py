"""From scores to advantages, per sample and step.

With alpha the KL weight and KL_j the step's KL at the sampled state, the return that follows the action of step k is

    R_k = r(x_0) - alpha * sum_{j > k} KL_j,

and the gradient of J = E[r] - alpha E[sum KL] is E[ sum_k grad log pi_k (R_k - b_k) ] - alpha E[ sum_k grad KL_k ]
for any baseline b_k that does not depend on the action. Baselines here leave the sample itself out of the mean (RLOO,
Kool et al. 2019): mean-including baselines shrink the first term by (G - 1) / G but not the second, i.e. raise alpha by
G / (G - 1), 14% for groups of 8.

Samples that were drawn together, such as those of opposite noises, are no baseline of each other either: as
E[r(-z) z] = -E[r(z) z], the usual mean multiplies the first term by G / (G - 1). The baseline of such a pair is the
mean over the others of its group.

What compares the samples of a group (rank, diversity) scores the others by the sample too, so that their mean is no
such baseline: in groups of G it multiplies the signal of a rank by G / (G - 1) and that of a diversity by
(G - 2) / (G - 1). The baseline of that part of a score is the mean over the other groups.

Dividing by a scale divides the whole objective: rewards, cost-to-go and the direct KL term. Where all samples share one
scale, the optimum is that of J and alpha is in reward units per nat. A scale of each group's own (GRPO, DDPO) depends
on the very scores that it divides: the rewards and alpha are both divided by s_g, but the two averages differ. What
alpha then amounts to, over alpha (`ddpo.control.diffusion.effective_alpha`):

    Gaussian rewards    E[1/s] / (G/(G-1) E[s])  =  (G-1) / (G-2)                            1.5, 1.17 for G = 4, 8
    success rate p      p (1-p) E[1/s; s > 0] / (G/(G-1) E[s]),   s^2 = m (1 - m),  G m ~ Bin(G, p)

GDPO (arXiv:2601.05242) normalises each reward r_j by itself, sums, and normalises the sum over the batch:

    A_j = (r_j - mean_group r_j) / std_group r_j,    A = sum_j w_j A_j,    A <- (A - mean_batch A) / std_batch A

so that a reward of small spread is not drowned by one of large spread, and groups that agree in their sum but differ in
its parts get different advantages. The weights then speak of deviations, not of reward units, and so does alpha. The
group mean here leaves the sample itself out, a factor G / (G - 1) that the last division removes.

Diversity (GARDO, arXiv:2512.24138): with d_i the distance of a sample to its nearest neighbour in the group, an
advantage above 0 is multiplied by d_i over the group's mean, so that of several good samples the rare ones count. That
is no longer the gradient of the reward (`ddpo verify --only gradient --full` has its direction on the exact chain). The
KL's part of an advantage is not multiplied.

With a critic the baseline of a step is what the critic expects at its state, and the advantages are generalised ones
(`ddpo.credit.gae`); they compare no samples.

B samples, T steps, G samples a group.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ddpo.credit.advantage_scale import ScaleRule, SteadyScale, count_flat_groups, divisor, group_std
from ddpo.credit.baselines import cost_to_go, leave_group_out, leave_one_out, mean_square_ratio, rarity
from ddpo.credit.gae import generalised_advantages
from ddpo.validation import check


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How scores become advantages.

    Attributes:
        baseline: `group` subtracts the mean over the other samples of the prompt in this batch (GRPO's groups, RLOO's
            mean); `prompt` a running mean over the other ones of the prompt's last `buffer_size` scores (DDPO), this
            batch's among them, as with `batch` until `min_count` are known; `batch` the mean over the other samples of
            the whole batch; `critic` what a critic expects at each step's state (`critic.kind`), until it is warm the
            mean over the other samples of the prompt, or of the batch where prompts have one sample.
        gae_lambda: With `critic`: 1 credits a step with all that was earned after it, 0 with the change of the critic's
            expectation alone; below 1 it varies less, and is biased where the critic is wrong. null takes 0.95.
        scale: What advantages and the KL weight are divided by. `batch_std` is the standard deviation of the whole
            batch's scores, `none` does not divide: with both, alpha is in reward units per nat (`batch_std` of a batch
            of 8 makes it up to a fifth more, of 32 3%). `group_std` is that of the baseline's population (GRPO, DDPO):
            prompts weigh the more the less their scores vary, and alpha amounts to another number, 1.5 times itself
            for Gaussian rewards in groups of 4. `std` is `group_std` as it was before flat groups kept their KL, for
            runs that began with it.
        clip: Advantages are clipped to [-clip, clip] (DDPO: 5), the KL weight is not: where a rare success is worth
            more deviations than that, alpha weighs more than it says. null for never.
        min_count: With `prompt`: scores a prompt needs before its own statistics are used.
        buffer_size: With `prompt`: scores remembered per prompt.
        combination: `sum` takes the advantage of the weighted sum of rewards. `gdpo` takes each reward's advantage by
            `baseline` and `scale` (the paper's: `group`, `group_std`), sums them by weight, and normalises the sum over
            the batch; alpha is then in units of that sum per nat, and `normalize` of the rewards has no effect.
        diversity: What tells how far a sample is from the others of its prompt: a reward that is listed (its weight may
            be 0) or a component of one, at least 0, such as `diversity/nearest`. Where the reward is above the
            baseline, the advantage is multiplied by it over its mean among the prompt's images; null for never.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    baseline: Literal["group", "prompt", "batch", "critic"] = "group"
    gae_lambda: float | None = None
    scale: ScaleRule = "batch_std"
    clip: float | None = None
    min_count: int = 16
    buffer_size: int = 32
    combination: Literal["sum", "gdpo"] = "sum"
    diversity: str | None = None

    def __post_init__(self) -> None:
        known = self.gae_lambda is None or 0 <= self.gae_lambda <= 1
        check(known, "gae_lambda", self.gae_lambda, "in [0, 1], or null")
        alone = self.gae_lambda is None or self.has_critic
        check(alone, "gae_lambda", self.gae_lambda, "null without baseline: critic, which it belongs to")
        cure = "with baseline: critic (it compares no samples)"
        check(not self.has_critic or self.combination == "sum", "combination", self.combination, f"sum {cure}")
        check(not self.has_critic or self.diversity is None, "diversity", self.diversity, f"null {cure}")
        cure = "sum, or baseline group or batch: gdpo compares the samples of one epoch"
        check(self.combination == "sum" or self.baseline != "prompt", "combination", self.combination, cure)
        cure = "null with combination: gdpo (its advantages are sums of several)"
        check(self.diversity is None or self.combination == "sum", "diversity", self.diversity, cure)
        check(self.clip is None or self.clip > 0, "clip", self.clip, "positive or null")
        check(self.min_count >= 2, "min_count", self.min_count, "at least 2")
        check(self.buffer_size >= self.min_count, "buffer_size", self.buffer_size, "at least min_count")

    @property
    def has_critic(self) -> bool:
        """Whether a critic is the baseline."""
        return self.baseline == "critic"

    @property
    def effective_gae_lambda(self) -> float:
        """`gae_lambda`, or its default."""
        return 0.95 if self.gae_lambda is None else self.gae_lambda

    @property
    def notice(self) -> str | None:
        """What a run should be told about its scale; None for nothing."""
        if self.scale != "std":
            return None
        return (
            "advantages.scale: std divides by each group's own deviation and gives a flat group's KL no weight, so "
            "that kl.alpha does not weigh what it says; kept for runs that began so, for new ones: batch_std, group_std"
        )


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """What the objective needs of the scores.

    Attributes:
        values: (B, T).
        kl_weight: Weight of each sample's own per-step KL in the loss, alpha over the scale, (B,).
        scale: What both were divided by, (B,) reward units; infinite where they have none.
        zero_variance_groups: Groups whose scores are all equal to rounding; their samples carry no reward signal.
        clipped: Share of entries that the clip changed, in [0, 1].
        variance_ratio: Of a critic's advantages at steps with noise the mean square, over that of the advantages
            against the other samples of the prompt (or of the batch); None without a critic that is warm.
    """

    values: Tensor
    kl_weight: Tensor
    scale: Tensor
    zero_variance_groups: int
    clipped: float
    variance_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a critic expected of an epoch's samples.

    Attributes:
        values: What was still to be earned at x_0 .. x_{T-1}, the KL of the step at hand included, (B, T) reward units.
        decisions: Which steps have noise, (T,) bool.
    """

    values: Tensor
    decisions: Tensor


class Part(NamedTuple):
    """One reward of several: its weight and raw scores (B,)."""

    weight: float
    scores: Tensor


class AdvantageEstimator:
    """Turns an epoch's scores into advantages.

    Remembers the scale of the last epoch, and scores per prompt where the baseline is `prompt`.
    """

    def __init__(self, config: AdvantageConfig) -> None:
        self.config = config
        self._history: dict[str, deque[float]] = {}
        self._steady = SteadyScale()

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
        compared: Tensor | None = None,
        twins: Tensor | None = None,
        distances: Tensor | None = None,
        expected: Expected | None = None,
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
            potential: Shaping potential before each action, (B, T) reward units; see `ddpo.credit.potential`.
            compared: The part of `scores` that compares the samples of a group, (B,); None for nothing.
            twins: Equal ids of samples that were drawn together, (B,) int64; None where each was drawn alone.
            distances: How far each sample is from the others of its group, (B,), at least 0; where `config.diversity`.
            expected: The critic's, where it is the baseline and warm.
        """
        assert kl is not None or alpha == 0.0, "the cost-to-go needs the KL of every step"
        scores = scores.double()
        batch, population = torch.zeros_like(groups), self.population(groups)
        cost = scores.new_zeros(len(scores), num_steps) if kl is None else cost_to_go(kl.double(), alpha)
        if potential is not None:
            cost = cost + potential.double()
        rule: ScaleRule = self.config.scale
        if self.config.combination == "gdpo":
            centered = scores = self._decoupled(parts, population, twins)
            spread = group_std(scores, batch)
            rule = "std" if rule == "std" else "batch_std"
        else:
            own = scores if compared is None else scores - compared.double()
            if self.config.baseline == "prompt":
                assert twins is None, "remembered scores do not tell who was drawn together"
                centered, spread = self._running(own, prompts, batch)
            else:
                centered, spread = leave_one_out(own, population, twins), group_std(scores, population)
            if compared is not None:
                centered = centered + leave_group_out(compared.double(), groups)
        if distances is not None:
            centered = torch.where(centered > 0, centered * rarity(distances.double(), groups), centered)
        scale = divisor(rule, scores, spread, self._steady)
        each = centered[:, None] - leave_one_out(cost, population, twins)
        ratio = None
        if expected is not None:
            earned = torch.zeros_like(cost) if kl is None else -alpha * kl.double()
            of_critic = generalised_advantages(
                scores,
                earned,
                expected.values.double(),
                gae_lambda=self.config.effective_gae_lambda,
                decisions=expected.decisions,
            )
            ratio = mean_square_ratio(of_critic[:, expected.decisions], each[:, expected.decisions])
            each = of_critic
        values = each / scale[:, None]
        bound = torch.inf if self.config.clip is None else self.config.clip
        return Advantages(
            values=values.clamp(-bound, bound).float(),
            kl_weight=(alpha / scale).float(),
            scale=scale.float(),
            zero_variance_groups=count_flat_groups(scores, groups),
            clipped=float((values.abs() > bound).double().mean()),
            variance_ratio=ratio,
        )

    def population(self, groups: Tensor) -> Tensor:
        """Which samples of an epoch share a baseline, (B,) int64: those of a group, or all.

        Beside a critic those of a group where every group has others.
        """
        several = int(torch.unique(groups, return_counts=True)[1].min()) > 1
        of_groups = self.config.baseline == "group" or (self.config.has_critic and several)
        return groups if of_groups else torch.zeros_like(groups)

    def _decoupled(self, parts: Sequence[Part], population: Tensor, twins: Tensor | None) -> Tensor:
        """GDPO: the weighted sum of each reward's own advantages, without its mean, (B,)."""
        if not parts:
            raise ValueError("combination: gdpo needs the raw scores of each reward")
        total = torch.zeros(len(population), dtype=torch.float64, device=population.device)
        for weight, raw in parts:
            scores = raw.double()
            scale = divisor(self.config.scale, scores, group_std(scores, population), SteadyScale())
            total = total + weight * leave_one_out(scores, population, twins) / scale
        return total - total.mean()

    def _running(self, scores: Tensor, prompts: Sequence[str], batch: Tensor) -> tuple[Tensor, Tensor]:
        """Scores minus the mean of the others that are remembered of their prompt, and the std of all, (B,) each.

        DDPO's running mean has this epoch's scores, and the sample itself, in it.
        """
        for prompt, score in zip(prompts, scores.tolist(), strict=True):
            self._history.setdefault(prompt, deque(maxlen=self.config.buffer_size)).append(score)
        centered, std = leave_one_out(scores, batch), group_std(scores, batch)
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

    def state_dict(self) -> dict[str, object]:
        """The last scale, and remembered scores by prompt; for JSON."""
        return {"scale": self._steady.value, "prompts": {prompt: list(own) for prompt, own in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restores `state_dict`, or remembered scores by prompt alone, which older checkpoints have in its place."""
        prompts, scale = state.get("prompts"), state.get("scale")
        if isinstance(prompts, dict) and not isinstance(scale, list):
            self._steady = SteadyScale(value=cast("float | None", scale))
        else:
            prompts = state
        scores = cast("Mapping[str, list[float]]", prompts)
        self._history = {prompt: deque(own, maxlen=self.config.buffer_size) for prompt, own in scores.items()}
