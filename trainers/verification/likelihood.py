"""The likelihood of a real pipeline, checked on the model that a user is going to train.

Everything is held against a second route: `torch.distributions`, the stock scheduler, finite differences.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpo import Condition, Gaussian, Policy, Trajectory
from ddpo.control.checks.base import Measurement
from ddpo.pipeline.denoiser import Precision

PROMPTS = ("a red circle", "two blue squares", "a green cross", "a yellow triangle")
RowsOf = Callable[[Policy, Trajectory], Iterator[Measurement]]
NATS_PER_DIMENSION: dict[Precision, float] = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}


def perturb(policy: Policy, *, scale: float = 0.02, seed: int = 0) -> None:
    """Moves every trained weight, as training would; a fresh LoRA has no effect to measure."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight), alpha=scale)


def log_prob_rows(policy: Policy, path: Trajectory) -> Iterator[Measurement]:
    """Against `torch.distributions`, in float64 from the same means."""
    error, largest = 0.0, 0.0
    for k in path.schedule.stochastic_steps:
        with torch.no_grad():
            step = policy(k, path.latents[:, k], path.condition)
        oracle = _normal(step).log_prob(path.latents[:, k + 1].double()).flatten(1).sum(1)
        error = max(error, float((step.log_prob(path.latents[:, k + 1]) - oracle).abs().max()))
        largest = max(largest, float(oracle.abs().max()))
    tolerance = 1e-7 * _dims(path)  # the squares are float32, of 1 on average
    yield Measurement(name=f"{_dims(path)} dimensions, |log-prob| to {largest:.0f} nats", exact="torch.distributions",
                      obtained="same to", error=error, tolerance=tolerance)  # fmt: skip


def kl_rows(policy: Policy, path: Trajectory) -> Iterator[Measurement]:
    """Against `torch.distributions`; then with the reference compared to itself."""
    error, total, own = 0.0, 0.0, 0.0
    for k in path.schedule.stochastic_steps:
        with torch.no_grad():
            step = policy(k, path.latents[:, k], path.condition)
        with policy.reference():
            pretrained = policy(k, path.latents[:, k], path.condition)
            own = max(own, float(pretrained.kl(policy(k, path.latents[:, k], path.condition)).max()))
        oracle = torch.distributions.kl_divergence(_normal(step), _normal(pretrained)).flatten(1).sum(1)
        error = max(error, float(((step.kl(pretrained) - oracle) / oracle.clamp(min=1e-12)).abs().max()))
        total += float(oracle.mean())
    yield Measurement(name=f"perturbed weights, path KL {total:.3g} nats", exact="torch.distributions",
                      obtained="same to (relative)", error=error, tolerance=1e-4)  # fmt: skip
    yield Measurement(name="pretrained weights", exact=0.0, obtained=own, error=own, tolerance=0.0)


def ratio_rows(policy: Policy, path: Trajectory, *, precision: Precision) -> Iterator[Measurement]:
    """Log-probabilities recomputed in shuffled micro-batches of another size that mix samples and steps."""
    steps = torch.tensor(path.schedule.stochastic_steps)
    rows = torch.arange(len(PROMPTS)).repeat_interleave(len(steps))
    every = steps.repeat(len(PROMPTS))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    differences = []
    for part in order.split(3):
        k, b = every[part], rows[part]
        with torch.no_grad():
            step = policy(k, path.latents[b, k], path.condition.index(b))
        differences.append((step.log_prob(path.latents[b, k + 1]) - path.log_probs[b, k]).abs())
    error = torch.cat(differences)
    tolerance = NATS_PER_DIMENSION[precision] * _dims(path)
    yield Measurement(name=f"max |delta log-prob|, {len(rows)} transitions", exact=0.0, obtained=float(error.max()),
                      error=float(error.mean()), tolerance=tolerance)  # fmt: skip


def scheduler_rows(policy: Policy, path: Trajectory) -> Iterator[Measurement]:
    """The mean of every noisy step against `DDIMScheduler.step`; nothing to compare with for flow matching."""
    scheduler = policy.pipeline.scheduler
    if not isinstance(scheduler, DDIMScheduler):
        return
    scheduler.set_timesteps(policy.schedule.num_steps)
    error = 0.0
    for k, t in enumerate(scheduler.timesteps):
        x = path.latents[:, k]
        with torch.no_grad():
            negative, positive = policy.denoiser.branches(
                x, policy.schedule.model_time[k].expand(len(x)), path.condition, policy.rule
            )
            output = policy.rule.combine(negative, positive, policy.sampler.guidance_scale).float()
            ours = policy(k, x, path.condition).mean
        options = {"eta": policy.sampler.eta, "use_clipped_model_output": policy.schedule.consistent}
        stock = scheduler.step(output, t, x, **options, variance_noise=torch.zeros_like(x), return_dict=False)[0]
        error = max(error, float((ours - stock).abs().max()))
    yield Measurement(name="mean of every step, max error", exact="DDIMScheduler.step", obtained="same to",
                      error=error, tolerance=1e-5 * max(1.0, float(path.latents.abs().max())))  # fmt: skip


def gradient_rows(policy: Policy, path: Trajectory) -> Iterator[Measurement]:
    """The derivative of log pi along its own gradient, against a central difference of the weights that it reaches.

    Where the schedule clamps the predicted image, log pi has kinks, and at a kink no derivative: the dimensions that
    cross one between the weights of any two evaluations are left out of both sides. Without a clamp there are none.
    """
    k = path.schedule.stochastic_steps[len(path.schedule.stochastic_steps) // 2]
    row = torch.tensor([0])
    condition, x, after = path.condition.index(row), path.latents[:1, k], path.latents[:1, k + 1]

    def log_prob(kept: Tensor) -> Tensor:
        step = policy(k, x, condition)
        return replace(step, mean=torch.where(kept, step.mean, after)).log_prob(after).sum()

    every = torch.ones_like(x, dtype=torch.bool)
    trained = list(policy.trainable().values())
    slopes = torch.autograd.grad(log_prob(every), trained, allow_unused=True)
    weights = [weight for weight, slope in zip(trained, slopes, strict=True) if slope is not None]
    gradient = [slope for slope in slopes if slope is not None]
    length = torch.cat([g.flatten() for g in gradient]).norm()
    direction = [g / length for g in gradient]
    sizes = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # too small drowns in rounding, too large in curvature: the best of a few
    kept = every
    if path.schedule.clip is not None:
        kept = _on_one_side(lambda: _clamped(policy, k, x, condition), weights, direction, sizes)
        gradient = list(torch.autograd.grad(log_prob(kept), weights))
    slope = float(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)))
    best, shown = float("inf"), float("nan")
    for size in sizes:
        ends = []
        for offset in (size, -size):
            with torch.no_grad(), _moved(weights, direction, offset):
                ends.append(float(log_prob(kept)))
        difference = (ends[0] - ends[1]) / (2 * size)
        if abs(difference / slope - 1) < best:
            best, shown = abs(difference / slope - 1), difference
    left_out = "" if kept.all() else f", {int(kept.sum())} of {kept.numel()} dimensions that cross no kink"
    yield Measurement(name=f"step {k}, along the gradient (nats){left_out}", exact=slope, obtained=shown, error=best,
                      tolerance=0.02)  # fmt: skip


@contextmanager
def _moved(weights: Sequence[Tensor], direction: Sequence[Tensor], distance: float) -> Iterator[None]:
    """The weights moved along a direction, for the time of a `with` block; exactly as they were afterwards."""
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight, along in zip(weights, direction, strict=True):
            weight.data.add_(along, alpha=distance)
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.data.copy_(old)


def _on_one_side(
    side: Callable[[], Tensor], weights: Sequence[Tensor], direction: Sequence[Tensor], sizes: Sequence[float]
) -> Tensor:
    """Which dimensions stay on one side of the clamp at all weights that a difference visits; bool, of x's shape."""
    here = side()
    kept = torch.ones_like(here, dtype=torch.bool)
    for size in sizes:
        for offset in (size, -size):
            with _moved(weights, direction, offset):
                kept &= side() == here
    return kept


@torch.no_grad()
def _clamped(policy: Policy, k: int, x: Tensor, condition: Condition) -> Tensor:
    """Which entries of the predicted image the schedule clamps: -1 from below, 1 from above, 0 not at all."""
    free = policy.at(replace(policy.schedule, clip=None))
    return (free(k, x, condition).mean - policy(k, x, condition).mean).sign()


def _normal(step: Gaussian) -> torch.distributions.Normal:
    wide = replace(step, mean=step.mean.double(), std=torch.as_tensor(step.std).double())
    return torch.distributions.Normal(wide.mean, wide.std.expand_as(wide.mean))


def _dims(path: Trajectory) -> int:
    return path.latents[0, 0].numel()
