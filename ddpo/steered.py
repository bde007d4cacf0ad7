"""Samples prompts under a steering: `steered_samples`, and what it cost.

Sample i is a function of its prompt, its seed and the steering: not of the batch (to the rounding of the network's
batched kernels). All particles of a sample are in one batch. G samples, P particles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.credit.lagrangian import Constraint
from ddpo.rollout import chain
from ddpo.seeds import sample_seeds
from ddpo.steering.base import Score, Steer, Weighing
from ddpo.steering.kinds import Kind
from ddpo.steering.particles import particle_seeds, resample, uniforms
from ddpo.steering.projection import check_bounds, projected
from ddpo.trajectory import Condition, Trajectory
from ddpo.validation import FieldError, UserError

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

RewardOf = Callable[[Tensor, list[str], list[Mapping[str, object]]], Tensor]
"""Rewards (N,) of images (N, 3, H, W) in [0, 1], N prompts and their metadata."""


@dataclass(kw_only=True)
class Cost:
    """What sampling took, counted while it ran.

    Attributes:
        network: Rows that went through the denoiser; guidance by two branches counts both.
        rewards: Images that were scored; those of bounds count apart.
    """

    network: int = 0
    rewards: int = 0


@dataclass(frozen=True, kw_only=True)
class SteeredSamples:
    """The samples and their price.

    Attributes:
        latents: One end for each sample, (G, *latent) on the CPU.
        images: (G, 3, H, W) in [0, 1] on the CPU.
        scores: Rewards of the images, (G,) float32.
        particles: Which particle of each sample was taken, (G,) int64.
        log_z: Log of the estimate of E exp(r / alpha), (G,) float64; None where the steering has none.
        multipliers: By which bounds were kept, by name, nats per unit of the score.
        cost: Of all of them together.
    """

    latents: Tensor
    images: Tensor
    scores: Tensor
    particles: Tensor
    log_z: Tensor | None
    multipliers: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds on the means over all samples of a call, kept by the weights of their particles.

    Attributes:
        constraints: On different scores; of each its `reward` and its bound count, as nothing is trained.
        scores: The scores (N,) by name of images (N, 3, H, W), N prompts and their metadata.
    """

    constraints: Sequence[Constraint]
    scores: Callable[[Tensor, list[str], list[Mapping[str, object]]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """All particles of G samples after the last step.

    Attributes:
        latents: (G P, *latent) on the CPU.
        images: (G P, 3, H, W) on the CPU.
        scores: (G, P) float64.
        bounded: Scores that are bounded, (G, P) each.
        weighing: Their weights.
        numbers: In [0, 1), by which one of each sample is taken, (G, P).
    """

    latents: Tensor
    images: Tensor
    scores: Tensor
    bounded: Mapping[str, Tensor]
    weighing: Weighing
    numbers: Tensor


@dataclass(frozen=True, kw_only=True)
class Steering:
    """How an epoch's samples are steered.

    Attributes:
        kind: The method.
        reward: What it steers by.
        batch_size: Rows of one call of the network.
    """

    kind: Kind
    reward: RewardOf
    batch_size: int


@torch.no_grad()
def steered_samples(
    policy: "Policy",
    prompts: Sequence[str],
    reward: RewardOf,
    *,
    steer: Kind,
    seeds: Tensor | None = None,
    metadata: Sequence[Mapping[str, object]] | None = None,
    batch_size: int = 16,
    bounds: Bounds | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> SteeredSamples:
    """One sample for each prompt, steered towards a reward.

    Args:
        policy: What is sampled from; inside `policy.reference()` the pretrained model.
        prompts: G texts.
        reward: Scores finished images and, on the way, predicted ones.
        steer: How.
        seeds: Of the samples, (G,) int64; default those of the first G samples of run seed 0.
        metadata: G dictionaries; default empty ones.
        batch_size: Rows of one call of the network; at least the steering's particles.
        bounds: On means over the samples; then all particles' images are kept until the end, and a sample depends on
            the others through the multipliers. None for no bounds.
        advance: Told after every step how many samples have taken it.

    Raises:
        UserError: The steering needs noise or a gradient that is not there, its particles do not fit into a batch, or
            have no weights to meet bounds by, no weights of them meet the bounds, or seeds and prompts disagree.
    """
    given = [{} for _ in prompts] if metadata is None else list(metadata)
    seeds = sample_seeds(0, 0, range(len(prompts))) if seeds is None else seeds.cpu()
    check_noise(steer, has_noise=bool(policy.schedule.stochastic_steps))
    check_particles(steer, batch_size=batch_size)
    if bounds is not None:
        check_weighs(steer)
    if not len(prompts) == len(seeds) == len(given):
        raise UserError(f"give one seed and metadata a prompt, got {len(prompts)}, {len(seeds)}, {len(given)}")
    cost, size, parts, whole = Cost(), batch_size // steer.particles, [], []
    for start in range(0, len(prompts), size):
        own = slice(start, start + size)
        ends = _batch(policy, prompts[own], reward, steer, seeds[own], given[own], cost, bounds, advance)
        if bounds is None:
            parts.append(_taken(ends, ends.weighing.log_weights))
        else:
            whole.append(ends)
    multipliers: dict[str, float] = {}
    if bounds is not None:
        weights = torch.cat([ends.weighing.log_weights for ends in whole])
        scores = {name: torch.cat([ends.bounded[name] for ends in whole]) for name in whole[0].bounded}
        weights, multipliers = projected(weights, scores, bounds.constraints)
        parts = [_taken(ends, own) for ends, own in zip(whole, weights.split(size), strict=True)]
    zs = [part.log_z for part in parts if part.log_z is not None]
    return SteeredSamples(
        latents=torch.cat([part.latents for part in parts]),
        images=torch.cat([part.images for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        particles=torch.cat([part.particles for part in parts]),
        log_z=torch.cat(zs) if zs else None,
        multipliers=multipliers,
        cost=cost,
    )


def steered_trajectory(
    policy: "Policy",
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, object]],
    seeds: Tensor,
    *,
    steering: Steering,
) -> Trajectory:
    """Steered samples as what learns from clean latents takes them: without log-probabilities, which are not theirs.

    Args:
        policy: What is sampled from.
        prompts: B texts.
        metadata: B dictionaries.
        seeds: (B,) int64.
        steering: How.
    """
    made = steered_samples(
        policy,
        prompts,
        steering.reward,
        steer=steering.kind,
        seeds=seeds,
        metadata=metadata,
        batch_size=steering.batch_size,
    )
    latents = made.latents.to(policy.device)
    return Trajectory(
        latents=latents[:, None],
        log_probs=latents.new_zeros(len(seeds), policy.schedule.num_steps, dtype=torch.float64),
        kl=None,
        condition=policy.encode(prompts, metadata),
        seeds=seeds,
        schedule=policy.schedule,
    )


def steered_ends(
    policy: "Policy",
    condition: Condition,
    seeds: Tensor,
    steer: Steer,
    *,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Steer]:
    """The clean latents of steered chains, (B, *latent), and the steering after the last step.

    Args:
        policy: What is sampled from.
        condition: B rows.
        seeds: Of the chains, (B,) int64.
        steer: Of the first step.
        advance: Told after every step.
    """
    noise = policy.noise(seeds)
    x = noise[:, 0]
    for step in chain(policy, x, condition, noise, seeds, steer=steer):
        x, steer = step.after, step.steer
        advance()
    return x, steer


def check_noise(steer: Kind, *, has_noise: bool) -> None:
    """Refuses a chain without noise for a steering that acts through it.

    Raises:
        UserError: There is none.
    """
    if steer.needs_noise and not has_noise:
        raise UserError(
            f"{steer.kind} needs a sampler with noise, such as ddim with eta 1 or flow_sde, and no step has any; take "
            "one, or best_of_n, which needs none"
        )


def check_particles(steer: Kind, *, batch_size: int) -> None:
    """Refuses more particles than are in a batch.

    Raises:
        FieldError: There are more.
    """
    if steer.particles > batch_size:
        raise FieldError("particles", steer.particles, f"at most the batch size, {batch_size}, as all are in one batch")


def check_weighs(steer: Kind) -> None:
    """Refuses bounds for a steering whose particles have no weights.

    Raises:
        UserError: They have none.
    """
    if not steer.weighs or steer.particles < 2:
        raise UserError(
            f"constraints are kept by the weights of particles, and {steer.kind} with {steer.particles} has none to "
            "move; steer by feynman_kac with several particles"
        )


def _batch(
    policy: "Policy",
    prompts: Sequence[str],
    reward: RewardOf,
    steer: Kind,
    seeds: Tensor,
    metadata: list[Mapping[str, object]],
    cost: Cost,
    bounds: Bounds | None,
    advance: Callable[[int], None],
) -> _Ends:
    """Whole groups of particles together."""
    count = steer.particles
    texts = [text for text in prompts for _ in range(count)]
    theirs = [entry for entry in metadata for _ in range(count)]
    seen = list(policy.rewards_metadata(texts, theirs))
    score = _score(reward, texts, seen, cost)
    condition, before = policy.encode(texts, theirs), policy.denoiser.network.rows
    begun = steer.begin(score, policy.schedule)
    ends, last = steered_ends(
        policy, condition, particle_seeds(seeds, count), begun, advance=lambda: advance(len(seeds))
    )
    cost.network += policy.denoiser.network.rows - before
    images = policy.decode(ends)
    scores = score(images, torch.arange(len(ends))).double().cpu().view(-1, count)
    bounded: dict[str, Tensor] = {}
    if bounds is not None:
        found = bounds.scores(images, texts, seen)
        cost.rewards += len(images)
        check_bounds(bounds.constraints, list(found))
        bounded = {one.reward: found[one.reward].double().cpu().view(-1, count) for one in bounds.constraints}
    return _Ends(
        latents=ends.cpu(),
        images=images.cpu(),
        scores=scores,
        bounded=bounded,
        weighing=last.weigh(scores),
        numbers=uniforms(seeds, policy.schedule.num_steps, count),
    )


def _taken(ends: _Ends, log_weights: Tensor) -> SteeredSamples:
    """One particle of each sample, by log-weights (G, P)."""
    chosen = resample(log_weights, ends.numbers, "multinomial")[:, 0]
    rows = torch.arange(len(chosen)) * log_weights.shape[1] + chosen
    return SteeredSamples(
        latents=ends.latents[rows],
        images=ends.images[rows],
        scores=ends.scores.flatten()[rows].float(),
        particles=chosen,
        log_z=ends.weighing.log_z,
    )


def _score(reward: RewardOf, texts: list[str], metadata: Sequence[Mapping[str, object]], cost: Cost) -> Score:
    def score(images: Tensor, rows: Tensor) -> Tensor:
        cost.rewards += len(images)
        return reward(images, [texts[row] for row in rows.tolist()], [metadata[row] for row in rows.tolist()])

    return score
