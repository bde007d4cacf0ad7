"""Samples prompts under a steering: `steered_samples`, and what it cost.

Sample i is a function of its prompt, its seed and the steering: not of the batch (to the rounding of the network's
batched kernels). All particles of a sample are in one batch. G samples, P particles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddpo.rollout import chain
from ddpo.seeds import sample_seeds
from ddpo.steering.base import Steer
from ddpo.steering.feynman_kac import FeynmanKac, Score
from ddpo.steering.kinds import Kind
from ddpo.steering.particles import particle_seeds, resample, uniforms
from ddpo.trajectory import Condition
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
        rewards: Images that were scored.
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
        cost: Of all of them together.
    """

    latents: Tensor
    images: Tensor
    scores: Tensor
    particles: Tensor
    log_z: Tensor | None
    cost: Cost = field(default_factory=Cost)


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

    Raises:
        UserError: The steering needs noise or a gradient that is not there, its particles do not fit into a batch, or
            seeds and prompts disagree.
    """
    given = [{} for _ in prompts] if metadata is None else list(metadata)
    seeds = sample_seeds(0, 0, range(len(prompts))) if seeds is None else seeds.cpu()
    _check(policy, steer, batch_size=batch_size)
    if not len(prompts) == len(seeds) == len(given):
        raise UserError(f"give one seed and metadata a prompt, got {len(prompts)}, {len(seeds)}, {len(given)}")
    cost, size, parts = Cost(), batch_size // steer.particles, []
    for start in range(0, len(prompts), size):
        own = slice(start, start + size)
        parts.append(_batch(policy, prompts[own], reward, steer, seeds[own], given[own], cost))
    zs = [part.log_z for part in parts if part.log_z is not None]
    return SteeredSamples(
        latents=torch.cat([part.latents for part in parts]),
        images=torch.cat([part.images for part in parts]),
        scores=torch.cat([part.scores for part in parts]),
        particles=torch.cat([part.particles for part in parts]),
        log_z=torch.cat(zs) if zs else None,
        cost=cost,
    )


def steered_ends(policy: "Policy", condition: Condition, seeds: Tensor, steer: Steer) -> tuple[Tensor, Steer]:
    """The clean latents of steered chains, (B, *latent), and the steering after the last step."""
    noise = policy.noise(seeds)
    x = noise[:, 0]
    for step in chain(policy, x, condition, noise, seeds, steer=steer):
        x, steer = step.after, step.steer
    return x, steer


def _check(policy: "Policy", steer: Kind, *, batch_size: int) -> None:
    if steer.needs_noise and not policy.schedule.stochastic_steps:
        raise UserError(
            f"{type(steer).__name__} needs a sampler with noise, and no step of {policy.sampler.kind!r} has any; take "
            "ddim with eta 1 or flow_sde, or best_of_n, which needs none"
        )
    if steer.particles > batch_size:
        raise FieldError("particles", steer.particles, f"at most the batch size, {batch_size}, as all are in one batch")


def _batch(
    policy: "Policy",
    prompts: Sequence[str],
    reward: RewardOf,
    steer: Kind,
    seeds: Tensor,
    metadata: list[Mapping[str, object]],
    cost: Cost,
) -> SteeredSamples:
    """Whole groups of particles together."""
    count = steer.particles
    texts = [text for text in prompts for _ in range(count)]
    theirs = [entry for entry in metadata for _ in range(count)]
    seen = list(policy.rewards_metadata(texts, theirs))
    score = _score(reward, texts, seen, cost)
    condition, begun = policy.encode(texts, theirs), steer.begin(score, policy.schedule)
    with _counting(policy.denoiser.module, cost):  # encoding runs the pipeline without its network
        ends, last = steered_ends(policy, condition, particle_seeds(seeds, count), begun)
    images = policy.decode(ends)
    scores = score(images, torch.arange(len(ends))).float().cpu().view(-1, count)
    log_weights = steer.log_weights(last, scores.double())
    chosen = resample(log_weights, uniforms(seeds, policy.schedule.num_steps, count), "multinomial")[:, 0]
    rows = torch.arange(len(seeds)) * count + chosen
    return SteeredSamples(
        latents=ends.cpu()[rows],
        images=images.cpu()[rows],
        scores=scores.flatten()[rows],
        particles=chosen,
        log_z=last.log_z() if isinstance(last, FeynmanKac) else None,
        cost=cost,
    )


def _score(reward: RewardOf, texts: list[str], metadata: Sequence[Mapping[str, object]], cost: Cost) -> Score:
    def score(images: Tensor, rows: Tensor) -> Tensor:
        cost.rewards += len(images)
        return reward(images, [texts[row] for row in rows.tolist()], [metadata[row] for row in rows.tolist()])

    return score


@contextmanager
def _counting(network: nn.Module, cost: Cost) -> Iterator[None]:
    """Counts the rows that go through a network."""

    def count(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if getattr(module.forward, "__func__", None) is not type(module).forward:
            return  # decoding runs the pipeline with a hollow forward
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        cost.network += given[0].shape[0] if given else 1

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
