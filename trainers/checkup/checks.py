"""What the readings of a checkup say, a finding a check: fine, look or wrong, with the key to change.

N images in groups of G, whose scores are r; sigma is their deviation within a group, the square root of the mean
unbiased variance: what an advantage is made of.
"""

import math
from collections.abc import Callable

from torch import Tensor

from ddpo.objectives import PolicyGradientConfig
from trainers.checkup.readings import Readings
from trainers.config import Config
from trainers.diagnosis.finding import Finding, Verdict

_NATS = (1e-3, 5.0, 20.0)
"""Nats that an epoch moves: less than the first is slow, more than the second fast, than the third too fast."""
_TOLD = 0.02
"""A cosine below this is taken for none: that of noise alone is of this size where few weights are trained."""
_WANTED = 0.1  # nats an epoch, which a rate that is too small or too large is told to aim at


def signal(config: Config, readings: Readings) -> Finding:
    """How the scores vary within and across groups."""
    flat = float((_within(readings) == 0).double().mean())
    inside, across = _sigma(readings), float(_means(readings).std())
    told = f"scores differ by {inside:.3g} within a prompt and {across:.3g} across {len(_means(readings))} prompts"
    told += f"; {flat:.0%} of the groups have equal scores"
    verdict: Verdict = "wrong" if flat > 0.8 else "look" if flat > 0.5 else "fine"
    cure = "" if verdict == "fine" else "prompts.source: harder or easier ones; or a reward with degrees"
    return Finding(name="signal", verdict=verdict, evidence=told, cure=cure)


def repeatable(config: Config, readings: Readings) -> Finding:
    """Whether the same image scores the same twice."""
    apart, sigma = float((readings.again - readings.totals).square().mean().sqrt()), _sigma(readings)
    share = apart / sigma if sigma > 0 else math.inf if apart > 0 else 0.0
    verdict: Verdict = "wrong" if share > 0.5 else "look" if share > 0.1 else "fine"
    told = f"the same images scored twice differ by {apart:.2g}, {_share(share)} of the spread within a prompt"
    cure = "" if verdict == "fine" else "rewards: one that scores an image the same twice (no dropout, no sampling)"
    return Finding(name="same image twice", verdict=verdict, evidence=told, cure=cure)


def robust(config: Config, readings: Readings) -> Finding:
    """How far a change that nobody sees moves the scores, their common shift aside."""
    found = {"JPEG of quality 90": readings.jpeg}
    if readings.round_trip is not None:
        found["the VAE's round trip"] = readings.round_trip
    sigma = _sigma(readings)
    shares = {name: float((values - readings.totals).std()) / sigma if sigma > 0 else 0.0
              for name, values in found.items()}  # fmt: skip
    told = "; ".join(f"{name} moves scores by {_share(share)}" for name, share in shares.items())
    worst = max(shares.values())
    verdict: Verdict = "look" if worst > 0.7 else "fine"
    cure = "" if verdict == "fine" else "heldout_rewards: another one beside it, to see what the rise is made of"
    return Finding(name="noise floor", verdict=verdict, evidence=f"{told} of the spread within a prompt", cure=cure)


def sampling_noise(config: Config, readings: Readings) -> Finding | None:
    """What the noise of training's sampler costs: against the evaluation's sampler, or against none."""
    if readings.quiet is None or readings.sharper is None:
        return None
    change = readings.totals - readings.quiet
    mean, error = float(change.mean()), float(change.std()) / math.sqrt(len(change))
    sigma = _sigma(readings)
    lost = mean < -2 * error and sigma > 0 and -mean > sigma
    ratio = float(readings.sharper.mean().exp())
    odd = not 0.5 < ratio < 2.0
    against = "the evaluation's" if config.evaluation_sampler != config.sampler else "none"
    told = f"with training's noise, against {against}: reward {mean:+.3g} ± {error:.2g}, {ratio:.2f} times as sharp"
    verdict: Verdict = "look" if lost or odd else "fine"
    cure = "" if verdict == "fine" else "sampler.eta: smaller; or sampler.num_steps: more; or sampler.kind: another"
    return Finding(name="sampling noise", verdict=verdict, evidence=told, cure=cure)


def gradient_signal(config: Config, readings: Readings) -> Finding:
    """How much of an epoch's gradient is signal.

    With g = mean + noise of variance S / N, the cosine c of two epochs of N images is |mean|^2 / (|mean|^2 + S / N) or
    so, and N (1 - c) / c images have as much signal as noise.
    """
    cosine, count = readings.cosine, len(readings.totals)
    if math.isnan(cosine):
        return Finding(name="gradient", verdict="wrong", evidence="the gradient is 0 or not finite",
                       cure="rewards and prompts: ones that tell the images of a prompt apart")  # fmt: skip
    told = f"the gradients of two epochs of {count} images have the cosine {cosine:.3f}"
    if cosine < _TOLD:
        return Finding(name="gradient", verdict="look", evidence=f"{told}: the signal is not told from the noise",
                       cure=f"--images {4 * count}, for a longer look")  # fmt: skip
    wanted = math.ceil(count * (1 - cosine) / cosine)
    told += f": signal and noise are equal in about {wanted:,}; an epoch has {config.batch.samples_per_epoch:,}"
    verdict: Verdict = "look" if wanted > 10 * config.batch.samples_per_epoch else "fine"
    cure = "" if verdict == "fine" else f"batch.samples_per_epoch: {_rounded(config, wanted // 5)} or more"
    return Finding(name="gradient", verdict=verdict, evidence=told, cure=cure)


def step_size(config: Config, readings: Readings) -> Finding | None:
    """How far the updates of one epoch at the peak rate move the policy."""
    if readings.moved is None:
        return None
    nats = float(readings.moved.nansum())
    slow, fast, wild = _NATS
    verdict: Verdict = (
        "wrong" if nats > wild or not math.isfinite(nats) else "look" if not slow < nats < fast else "fine"
    )
    region = config.optimizer.is_trust_region
    size = f"radius {config.optimizer.region.radius:g}" if region else f"rate {config.learning_rate:g}"
    told = f"the updates of an epoch at the {size} move the policy by {nats:.3g} nats"
    cure = "" if verdict == "fine" else f"{_sized(config, nats)} ({_WANTED:g} nats an epoch)"
    return Finding(name="step size", verdict=verdict, evidence=told, cure=cure, series=readings.moved.tolist())


def _sized(config: Config, nats: float) -> str:
    """The key that sets the size of updates, and the value at which an epoch would move the policy as wanted."""
    share = _WANTED / nats if nats > 0 and math.isfinite(nats) else 0.01
    if config.optimizer.is_trust_region:
        return f"optimizer.radius: about {config.optimizer.region.radius * share:.1g}"
    return f"optimizer.learning_rate: about {min(1.0, config.learning_rate * math.sqrt(share)):.1g}"


def clip_range(config: Config, readings: Readings) -> Finding | None:
    """The clip in nats, beside drift and what an epoch moves: a step of KL k has log-ratios of about (2 k)^(1/2)."""
    objective = config.objective
    if not isinstance(objective, PolicyGradientConfig) or objective.is_on_policy or objective.mask == "kl":
        return None
    if objective.ratio == "guard" or readings.drift is None or readings.moved is None:
        return None
    unit = readings.dims if objective.ratio == "per_dimension" else 1
    nats = objective.effective_clip_range * unit
    drift = float(readings.drift.nan_to_num(0.0).max())
    typical = math.sqrt(2 * float(readings.moved.nan_to_num(0.0).max()))
    told = (
        f"log-ratios are clipped at {nats:.3g} nats ({objective.effective_clip_range:g} x {unit:,}); recomputing "
        f"differs by up to {drift:.2g} nats at a step, an epoch moves a step by about {typical:.2g}"
    )
    if drift > 0.5 * nats:
        return Finding(name="clip and drift", verdict="wrong", evidence=told, series=readings.drift.tolist(),
                       cure="model.precision: fp32; equal sample_batch_size and train_batch_size")  # fmt: skip
    verdict: Verdict = "look" if typical > 10 * nats or drift > 0.1 * nats else "fine"
    cure = "" if verdict == "fine" else "optimizer.learning_rate: lower; or objective.clip_range: larger"
    return Finding(name="clip and drift", verdict=verdict, evidence=told, cure=cure)


def duration(config: Config, readings: Readings) -> Finding:
    """What an epoch of the configured size takes, on this device alone, and memory."""
    scale = config.batch.samples_per_epoch / len(readings.totals)
    seconds = {phase: spent * scale for phase, spent in readings.seconds.items()}
    total = sum(seconds.values())
    parts = ", ".join(f"{phase} {spent:.3g}" for phase, spent in seconds.items())
    hours = config.epochs * total / 3600
    told = f"an epoch takes about {total:.3g} s here ({parts}), {config.epochs:,} of them {hours:.3g} h"
    if config.max_minutes is not None and config.max_minutes < 60 * hours:
        told += f", which max_minutes ends after {config.max_minutes:g} minutes"
    told += f"; at most {readings.memory_gib:.3g} GiB"
    if readings.device_gib is not None:
        told += f" of {readings.device_gib:.3g}"
    waits = seconds.get("reward", 0.0) > 0.5 * total
    full = readings.device_gib is not None and readings.memory_gib > 0.92 * readings.device_gib
    cures = [*(["reward_processes.devices: processes of their own"] if waits else []),
             *(["batch.train_batch_size and sample_batch_size: smaller"] if full else [])]  # fmt: skip
    verdict: Verdict = "look" if cures else "fine"
    return Finding(name="time and memory", verdict=verdict, evidence=told, cure="; ".join(cures))


CHECKS: tuple[Callable[[Config, Readings], Finding | None], ...] = (
    signal, repeatable, robust, sampling_noise, gradient_signal, step_size, clip_range, duration,
)  # fmt: skip


def findings(config: Config, readings: Readings) -> list[Finding]:
    """A finding a check that applies, in their order.

    Args:
        config: The whole run's, not that of the checkup.
        readings: Of the checkup.
    """
    return [finding for check in CHECKS if (finding := check(config, readings)) is not None]


def _grouped(values: Tensor, readings: Readings) -> Tensor:
    """(N / G, G)."""
    return values.double().unflatten(0, (len(readings.groups.unique()), -1))


def _means(readings: Readings) -> Tensor:
    return _grouped(readings.totals, readings).mean(1)


def _within(readings: Readings) -> Tensor:
    """Variance of each group, unbiased; of groups of one, that of all images."""
    grouped = _grouped(readings.totals, readings)
    return grouped.var(1) if grouped.shape[1] > 1 else grouped.flatten().var().expand(1)


def _sigma(readings: Readings) -> float:
    return float(_within(readings).mean().sqrt())


def _share(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "all"


def _rounded(config: Config, images: int) -> int:
    """A number of images in whole groups."""
    return config.batch.group_size * math.ceil(images / config.batch.group_size)
