"""Learning through the reward: the chain is differentiated as a whole, from the score back to the weights.

    J = E[ r(x_T) - alpha sum_k KL_k ],    x_{k+1} = mean_k(x_k) + std_k noise_k

is differentiable along the chain with the noise held as it was drawn. With all steps in the graph the gradient is
exact, KL and steps without noise included. Published methods leave parts of the graph out, for memory or for stability,
and are presets:

    draft      the last K steps; all of them by default: exact                   DRaFT-K, arXiv:2309.17400
    draft_lv   the last step; its reward is averaged with those of n predictions from the image, noised anew to the
               level of that step: less variance for one more row each           DRaFT-LV, the same
    alignprop  the last K steps, K uniform over 1 .. T for each chain            AlignProp, arXiv:2310.03739
    refl       a random step of the last quarter; the image that it predicts is scored, up to r = 2
                                                                                 ReFL, arXiv:2304.05977
    drtune     some steps, evenly spaced from a random start; the network is not differentiated by its input; a random
               step of the last 40% predicts the image that is scored            DRTune, arXiv:2405.00760

What leaves parts out is biased (docs/algorithms.md has the size on the exact chain): weights that act in the steps
before are moved by what is good for the last. The KL is that of the steps in the graph.

The loss is -J in reward units, a mean over chains. A total is differentiated as it was reported, in the unit of the
first epoch's scales under `normalize`, so that alpha means what it means elsewhere.

Deviations: AlignProp's code draws anew at every step whether to detach, and never detaches the latents; ReFL's passes a
step's index for its time. Their factors on the loss, .01 and .001, are left out, as Adam does not see them, and so is
ReFL's pretraining term. DRaFT-LV adds rewards up that are averaged here.

Legend: `N` chains of a micro-batch, `T` steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ddpo.objectives.base import Demand, Loss, Models
from ddpo.objectives.experience import Experience
from ddpo.objectives.pathwise import StepKind, Stretch, differentiate
from ddpo.sampling.schedule import Schedule
from ddpo.seeds import fill_normal, stream
from ddpo.trajectory import Keep, Samples
from ddpo.validation import check

Preset = Literal["draft", "draft_lv", "alignprop", "refl", "drtune"]
LastSteps = int | Literal["all", "random"]


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """What a preset decides; see `RewardGradientConfig`."""

    last_steps: LastSteps = "all"
    trained_steps: int | Literal["all"] = "all"
    network_jacobian: bool = True
    early_stop: float = 0.0
    extra_predictions: int = 0
    ceiling: float | None = None


PRESETS: dict[Preset, Knobs] = {
    "draft": Knobs(),
    "draft_lv": Knobs(last_steps=1, extra_predictions=2),
    "alignprop": Knobs(last_steps="random"),
    "refl": Knobs(last_steps=1, early_stop=0.25, ceiling=2.0),
    "drtune": Knobs(trained_steps=3, network_jacobian=False, early_stop=0.4),
}


@dataclass(frozen=True, kw_only=True)
class RewardGradientConfig:
    """The gradient of differentiable rewards through the denoising chain.

    Attributes:
        preset: `draft`, `draft_lv`, `alignprop`, `refl` or `drtune`: sets the keys below that are null.
        last_steps: How many of a chain's last steps have a graph: a number, `all`, or `random`, drawn for each chain.
        trained_steps: How many of these, evenly spaced from a random start, or `all`.
        network_jacobian: Whether the network is differentiated by its input too; false leaves the schedule's
            coefficients, and is needed where `trained_steps` is a number.
        early_stop: Share of the chain's last steps of which a random one ends it, by the clean image that it predicts;
            0 goes to the end.
        extra_predictions: Images besides that are predicted by the last step from the noised image, and scored.
        ceiling: Reward above which there is nothing to gain.
        recompute_steps: Drop the activations of each step and compute them again in the backward pass: memory of one
            step, one more forward pass. null does so where more than one step has a graph.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["reward_gradient"] = "reward_gradient"
    preset: Preset = "draft"
    last_steps: LastSteps | None = None
    trained_steps: int | Literal["all"] | None = None
    network_jacobian: bool | None = None
    early_stop: float | None = None
    extra_predictions: int | None = None
    ceiling: float | None = None
    recompute_steps: bool | None = None

    def __post_init__(self) -> None:
        known = self.preset in PRESETS
        check(known, "preset", self.preset, f"one of {', '.join(PRESETS)}")
        for name in ("last_steps", "trained_steps"):
            value = getattr(self, name)
            check(not isinstance(value, int) or value >= 1, name, value, "at least 1, or a name")
        stop, extra = self.early_stop, self.extra_predictions
        check(stop is None or 0 <= stop <= 1, "early_stop", stop, "in [0, 1]")
        check(extra is None or extra >= 0, "extra_predictions", extra, "at least 0")
        knobs = self.knobs
        few = knobs.trained_steps != "all"
        check(
            not (few and knobs.network_jacobian), "network_jacobian", True,
            "false where trained_steps is a number (the steps between would need the network's Jacobian)",
        )  # fmt: skip
        early = knobs.early_stop > 0 and knobs.extra_predictions > 0
        check(not early, "extra_predictions", knobs.extra_predictions, "0 with early_stop (they noise the last image)")

    @property
    def knobs(self) -> Knobs:
        """The preset's, with the keys that are given."""
        names = ("last_steps", "trained_steps", "network_jacobian", "early_stop", "extra_predictions", "ceiling")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(PRESETS[self.preset], **given)

    def build(self) -> "RewardGradient":
        """The objective with these keys."""
        knobs = self.knobs

        def graph_steps(num_steps: int) -> int:
            bounds = [value for value in (knobs.last_steps, knobs.trained_steps) if isinstance(value, int)]
            return min([num_steps, *bounds]) + knobs.extra_predictions

        fixed = isinstance(knobs.last_steps, int) and knobs.early_stop == 0
        recomputed = graph_steps(2) > 1 if self.recompute_steps is None else self.recompute_steps
        return RewardGradient(
            demand=Demand(
                name=self.preset,
                unit="chain",
                last_steps=knobs.last_steps if isinstance(knobs.last_steps, int) else 1,
                units=lambda num_stochastic: 1,
                weighs_kl=True,
                reward_gradient=True,
                keep=Keep.last(int(knobs.last_steps) + 2) if fixed else Keep.ALL,
                chain=True,
                graph_steps=graph_steps,
                decodes=1 + knobs.extra_predictions,
                recomputed=recomputed,
                varies=knobs.last_steps == "random" or knobs.trained_steps != "all" or knobs.early_stop > 0,
            ),
            knobs=knobs,
            recomputed=recomputed,
        )


@dataclass(frozen=True, kw_only=True)
class Chains:
    """A micro-batch of N chains.

    Attributes:
        samples: N, with the states that are kept of them.
        stretches: Which of them are differentiated alike, as row numbers on the CPU, and where; they make up all N.
        eps: Standard normal noise of the extra predictions, (N, n, *latent).
        alpha: Reward units per nat.
    """

    samples: Samples
    stretches: tuple[tuple[Tensor, Stretch], ...]
    eps: Tensor
    alpha: float


@dataclass(frozen=True, kw_only=True)
class RewardGradient:
    """The gradient of the reward through the chain: a unit is a chain.

    Attributes:
        demand: Differentiable rewards, and the states from which chains are taken again.
        knobs: Which parts of the graph there are.
        recomputed: Whether a step's activations are computed again in the backward pass.
    """

    demand: Demand
    knobs: Knobs
    recomputed: bool

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> Chains:
        """The chains of samples `rows`; what is drawn for one depends on the pass and the sample's seed alone."""
        samples = experience.samples.index(rows)
        path, num_extra = samples.trajectory, self.knobs.extra_predictions
        eps = torch.empty(len(rows), num_extra, *path.final.shape[1:])
        alike: dict[tuple[StepKind, ...], list[tuple[int, int]]] = {}
        for row, (sample, slot) in enumerate(zip(path.seeds.tolist(), slots.tolist(), strict=True)):
            random = stream(seed, sample, place=slot)
            first, pattern = self._drawn(path.schedule, random)
            alike.setdefault(pattern, []).append((row, first))
            fill_normal(eps[row], random)
        return Chains(
            samples=samples,
            stretches=tuple(
                (torch.tensor([row for row, _ in members]), self._stretch([first for _, first in members], pattern))
                for pattern, members in alike.items()
            ),
            eps=eps.to(path.log_probs.device),
            alpha=experience.alpha,
        )

    def losses(self, models: Models, batch: Chains) -> Iterator[Loss]:
        """-r + alpha KL of the chains that are differentiated alike, one loss each."""
        assert models.score is not None, "rewards are differentiated"
        for rows, stretch in batch.stretches:
            samples = batch.samples if len(batch.stretches) == 1 else batch.samples.index(rows)
            reached = differentiate(
                models.policy, samples.trajectory, stretch, weighs_kl=batch.alpha > 0, recomputed=self.recomputed
            )
            rewards = self._rewards(models, samples, reached.latents, batch.eps[rows.to(batch.eps.device)])
            value = -rewards if self.knobs.ceiling is None else torch.relu(self.knobs.ceiling - rewards)
            loss = (value + batch.alpha * reached.kl).sum() / len(batch.samples)
            metrics = {
                "reward": rewards.detach(),
                "graph_steps": torch.full_like(rewards, stretch.pattern.count("trained")).detach(),
                **({"graph_kl_nats": reached.kl.detach()} if batch.alpha > 0 else {}),
            }
            yield Loss(value=loss, metrics=metrics, drift=reached.drift)

    def _rewards(self, models: Models, samples: Samples, latents: Tensor, eps: Tensor) -> Tensor:
        """Rewards of clean latents with their graph, (N,): the mean with those of the extra predictions."""
        policy, last = models.policy, _last_trained(models.policy.schedule)
        total = self._score(models, samples, latents)
        for noise in eps.unbind(1):
            noised = policy.schedule.noised(last, latents.detach(), noise)
            total = total + self._score(models, samples, policy.predict(last, noised, samples.trajectory.condition).x0)
        return total / (1 + eps.shape[1])

    def _score(self, models: Models, samples: Samples, latents: Tensor) -> Tensor:
        assert models.score is not None
        return models.score(models.policy.decode(latents, with_gradient=True), samples.prompts, samples.metadata)

    def _stretch(self, first: list[int], pattern: tuple[StepKind, ...]) -> Stretch:
        return Stretch(
            first=torch.tensor(first),
            pattern=pattern,
            jacobian=self.knobs.network_jacobian,
            predicted=self.knobs.early_stop > 0,
        )

    def _drawn(self, schedule: Schedule, random: np.random.Generator) -> tuple[int, tuple[StepKind, ...]]:
        """The first step of a chain's stretch, and what the steps from there on are."""
        knobs, num_steps, last = self.knobs, schedule.num_steps, _last_trained(schedule)
        end = num_steps - 1
        if knobs.early_stop > 0:
            last = end = last - int(random.integers(max(1, round(knobs.early_stop * num_steps))))
        count = num_steps
        if knobs.last_steps != "all":
            count = 1 + int(random.integers(last + 1)) if knobs.last_steps == "random" else int(knobs.last_steps)
        trained = range(max(0, last + 1 - count), last + 1)
        if isinstance(knobs.trained_steps, int):
            spacing = max(1, min(count, num_steps) // knobs.trained_steps)
            spaced = range(trained[0] + int(random.integers(spacing)), last + 1, spacing)[: knobs.trained_steps]
            trained = spaced or trained[-1:]  # a chain may end before the first
        other: StepKind = "pretrained" if knobs.network_jacobian else "carried"
        return trained[0], tuple("trained" if k in trained else other for k in range(trained[0], end + 1))


def _last_trained(schedule: Schedule) -> int:
    """The last step that the trained weights make."""
    return max(k for k in range(schedule.num_steps) if k not in schedule.pretrained_steps)
