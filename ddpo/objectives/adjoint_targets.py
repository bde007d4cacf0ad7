"""What adjoint matching regresses on: adjoints of sampled chains, by the pretrained network alone.

    a_T = -grad r(decode(x_T)) / alpha,    a_k = J_k(x_k)^T a_{k+1},    J_k the Jacobian of the pretrained step's mean

at the sampled states, without a graph by any weights: a forward and a backward pass of the pretrained network a step.
The mean that a step should have is then

    target_k = mean_ref_k(x_k) - std_k^2 a_{k+1}

whose expectation, given x_k, is the optimal mean where all later steps are optimal (`.adjoint_matching`). Steps
without noise are passed through and have no target. A sample whose reward has no finite gradient gets the weight 0; so
does one whose loss at the sampling weights,

    mean_k |mean_k - target_k|^2 / (2 std_k^2)    nats, over the trained steps,

is above a moving average of a quantile of all samples'.

Legend: `B` samples, `K` trained steps of each, `T` steps.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.objectives.base import Gather, Models
from ddpo.objectives.experience import Experience
from ddpo.placement import concatenate
from ddpo.sampling.schedule import coefficient
from ddpo.seeds import stream
from ddpo.trajectory import Condition, Samples

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

QUANTILE_DECAY = 0.9


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is regressed on what, of B samples; kept where their trajectories were.

    Attributes:
        steps: Trained steps, (B, K) int64 on the CPU.
        states: x_k, (B, K, *latent).
        means: Target of the step's mean, (B, K, *latent).
        weights: Of each term, (B, K), that make their mean one over all steps; 0 for samples that are left out.
        pull: |std_k a_{k+1}|^2 / 2, (B, K) nats: the KL of the target to the pretrained step.
        condition: B rows.
    """

    steps: Tensor
    states: Tensor
    means: Tensor
    weights: Tensor
    pull: Tensor
    condition: Condition

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        own = {name: getattr(self, name) for name in _FIELDS}
        sides = {"positive": self.condition.positive, "negative": self.condition.negative}
        return own | {f"{side}.{name}": value for side, values in sides.items() for name, value in values.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Targets":
        """What `tensors` gave."""
        sides: dict[str, dict[str, Tensor]] = {"positive": {}, "negative": {}}
        for name, value in tensors.items():
            side, _, rest = name.partition(".")
            if side in sides and rest:
                sides[side][rest] = value
        own = {name: tensors[name] for name in _FIELDS}
        return Targets(**own, condition=Condition(**sides))

    @staticmethod
    def join(parts: "list[Targets]") -> "Targets":
        """All samples of `parts`, in order."""
        return Targets(
            **{name: concatenate([getattr(part, name) for part in parts]) for name in _FIELDS},
            condition=Condition.concatenate([part.condition for part in parts]),
        )


_FIELDS = ("steps", "states", "means", "weights", "pull")


@dataclass(frozen=True, kw_only=True)
class AdjointRules:
    """How targets are made.

    Attributes:
        num_trained: Steps of a sample that are trained, K; None for all with noise.
        early_fraction: Share of the steps with noise, the first ones, from which half of the K are drawn.
        published_pairing: Whether a step is paired with the adjoint of its own state, a_k, as in the authors' code.
        loss_quantile: Samples above it are left out; None for none.
        kept_epochs: Epochs before the present one whose targets are trained on again.
    """

    num_trained: int | None
    early_fraction: float
    published_pairing: bool
    loss_quantile: float | None
    kept_epochs: int


class AdjointTargets:
    """Makes the targets of each epoch, and remembers those of the last ones (`ddpo.objectives.base.Preparation`)."""

    def __init__(self, rules: AdjointRules) -> None:
        """Takes how; nothing is remembered yet."""
        self._rules = rules
        self._kept: deque[Targets] = deque(maxlen=rules.kept_epochs + 1)
        self._threshold: float | None = None

    def __call__(
        self, models: Models, experience: Experience, sizes: Iterable[int], *, seed: int, gather: Gather
    ) -> Experience:
        """The experience with its targets, newest epoch first, in `prepared`.

        Args:
            models: The view that is trained, and the score with its graph.
            experience: Of this process, with alpha above 0.
            sizes: Samples of each batch; together all.
            seed: Of the epoch.
            gather: Rows of all processes.
        """
        path, rules = experience.trajectory, self._rules
        steps, weights = draw_steps(rules, experience.decisions, path.seeds, seed=seed)
        parts, losses, start = [], [], 0
        for size in sizes:
            rows = torch.arange(start, start + size)
            if size:
                samples = experience.samples.index(rows)
                made = matched(
                    models, samples, steps[rows], weights[rows], alpha=experience.alpha,
                    published=rules.published_pairing,
                )  # fmt: skip
                losses.append(sampled_loss(made, samples) if rules.loss_quantile else made.pull.mean(1))
                parts.append(_to(made, path.latents.device))
            start += size
        targets = Targets.join(parts)
        if rules.loss_quantile is not None:
            targets = self._filtered(targets, torch.cat(losses), rules.loss_quantile, gather)
        self._kept.appendleft(targets)
        return replace(experience, prepared=tuple(self._kept))

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, by name."""
        kept = list(self._kept)[: self._rules.kept_epochs]
        tensors = {f"{age}.{name}": value for age, one in enumerate(kept) for name, value in one.tensors().items()}
        if self._threshold is not None:
            tensors["threshold"] = torch.tensor(self._threshold, dtype=torch.float64)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Remembers what `tensors` gave, in place of what it did."""
        ages: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            age, _, rest = name.partition(".")
            if rest:
                ages.setdefault(int(age), {})[rest] = value
        self._kept.clear()
        self._kept.extend(Targets.of(ages[age]) for age in sorted(ages))
        self._threshold = float(tensors["threshold"]) if "threshold" in tensors else None

    def _filtered(self, targets: Targets, losses: Tensor, quantile: float, gather: Gather) -> Targets:
        """The targets without those of samples whose loss is above the moving quantile."""
        everyones = gather(losses.double()).cpu()
        now = float(everyones[everyones.isfinite()].quantile(quantile)) if bool(everyones.isfinite().any()) else 0.0
        before = self._threshold
        self._threshold = now if before is None else QUANTILE_DECAY * before + (1 - QUANTILE_DECAY) * now
        kept = (losses <= self._threshold).to(targets.weights)
        return replace(targets, weights=targets.weights * kept[:, None])


def draw_steps(rules: AdjointRules, noisy: Tensor, seeds: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Which steps of samples are trained, and the weights that make their mean one over all: (B, K) each, on the CPU.

    Half of a sample's steps come from the first `early_fraction` of the noisy ones, half from the others, each from a
    stratum of its own.

    Args:
        rules: How many.
        noisy: Steps with noise, (S,) int64.
        seeds: Of the samples, (B,) int64.
        seed: Of the epoch.
    """
    count = rules.num_trained
    if count is None:
        return noisy.expand(len(seeds), -1), torch.ones(len(seeds), len(noisy))
    random = torch.tensor([stream(seed, sample).random(count).tolist() for sample in seeds.tolist()])
    place = (torch.arange(count) + random.double()) / count  # in [0, 1), a stratum each
    early, fraction = place < 0.5, rules.early_fraction
    stretch = torch.where(early, 2 * fraction, 2 * (1 - fraction))  # how much rarer than evenly a place is drawn
    place = torch.where(early, stretch * place, fraction + stretch * (place - 0.5))
    slots = (place * len(noisy)).long().clamp(max=len(noisy) - 1)
    return noisy[slots], stretch.float()


def matched(
    models: Models, samples: Samples, steps: Tensor, weights: Tensor, *, alpha: float, published: bool
) -> Targets:
    """The targets of B samples at some steps.

    Args:
        models: The view that is trained, and the score with its graph.
        samples: With all states, on the device.
        steps: (B, K) int64 on the CPU.
        weights: (B, K) of each term.
        alpha: Reward units per nat.
        published: Whether step k is paired with a_k.
    """
    policy, path = models.policy.at(samples.trajectory.schedule), samples.trajectory
    shape = (*steps.shape, *path.final.shape[1:])
    states, means = path.final.new_zeros(shape), path.final.new_zeros(shape)
    pull = path.final.new_zeros(steps.shape)
    adjoint = final_adjoint(models, samples) / alpha
    finite = adjoint.flatten(1).isfinite().all(1)
    adjoint = torch.where(finite.reshape(-1, *[1] * (adjoint.ndim - 1)), adjoint, torch.zeros_like(adjoint))
    first = path.schedule.stochastic_steps[0]  # whichever are drawn: processes that share a network keep in step
    with policy.reference(grad=True):
        for k in reversed(range(first, path.schedule.num_steps)):
            x = path.state(k)
            mean, before = backward(policy, k, x, path.condition, adjoint)
            rows, slots = (place.to(x.device) for place in torch.nonzero(steps == k, as_tuple=True))
            std = coefficient(policy.schedule.std, k, mean)
            paired = (before if published else adjoint)[rows]
            states[rows, slots] = x[rows]
            means[rows, slots] = mean[rows] - std**2 * paired
            pull[rows, slots] = 0.5 * (std * paired).flatten(1).square().sum(1)
            adjoint = before
    kept = weights.to(pull) * finite[:, None]
    return Targets(steps=steps, states=states, means=means, weights=kept, pull=pull, condition=path.condition)


def final_adjoint(models: Models, samples: Samples) -> Tensor:
    """-grad r(decode(x_T)), (B, *latent) in reward units per latent unit; not finite where the gradient is not."""
    assert models.score is not None, "rewards are differentiated"
    with torch.enable_grad():
        latents = samples.trajectory.final.detach().requires_grad_()
        rewards = models.score(models.policy.decode(latents, with_gradient=True), samples.prompts, samples.metadata)
        (gradient,) = torch.autograd.grad(rewards.sum(), latents)
    return -gradient


def backward(policy: "Policy", k: int, x: Tensor, condition: Condition, adjoint: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of step k at x and its Jacobian's transpose times the adjoint, (B, *latent) each, without a graph.

    The adjoint goes through the network at a size near 1, so that half precision loses none of it.
    """
    leaf = x.detach().requires_grad_()
    mean = policy(k, leaf, condition).mean
    largest = adjoint.abs().amax().clamp(min=torch.finfo(adjoint.dtype).tiny)
    scale = torch.exp2(largest.log2().floor())
    (product,) = torch.autograd.grad(mean, leaf, adjoint / scale)
    return mean.detach(), product * scale


def sampled_loss(targets: Targets, samples: Samples) -> Tensor:
    """Each sample's mean loss at the weights that sampled it, (B,) nats."""
    path = samples.trajectory
    assert path.means is not None, "the means of sampling are kept"
    places = torch.searchsorted(torch.tensor(path.schedule.stochastic_steps), targets.steps.contiguous())
    own = path.means[torch.arange(len(places))[:, None], places.to(path.means.device)]
    apart = (own - targets.means).flatten(2).square().sum(2)
    return (0.5 * apart / path.schedule.std.to(apart)[targets.steps.to(apart.device)] ** 2).mean(1)


def _to(targets: Targets, device: torch.device) -> Targets:
    moved = {name: getattr(targets, name).to(device) for name in ("states", "means")}
    return replace(targets, **moved, condition=targets.condition.to(device))
