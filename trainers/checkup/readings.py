"""What a checkup measures: two small epochs of the configured run, their gradients, and one epoch's updates.

N images in groups of G; T denoising steps; D latent dimensions. Nothing here judges (`trainers.checkup.checks` does).

    collect A, collect B -> gradients g_A, g_B at the pretrained weights; then the updates of B -> KL to the pretrained
"""

import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.seeds import sample_seeds
from ddpo.validation import UserError
from rewards import Scores
from trainers.checkup.disturbances import compressed, encoded, sharpness
from trainers.config import Config
from trainers.config.groups import CheckpointConfig, EvaluationConfig, TrackingConfig
from trainers.config.io import to_yaml
from trainers.epoch.binding import Collected, critic_of, online, updater
from trainers.epoch.learner import Learner
from trainers.epoch.step_rules import StepReport, StepRule, Update
from trainers.epoch.update import Updater
from trainers.evaluation.evaluator import sample_images
from trainers.parallel.processes import Processes
from trainers.run_folder.folder import RunFolder
from trainers.scoring.scorer import scoring_threads
from trainers.session import Loaded, Session, make_session
from trainers.tracking.metrics import Stopwatch, memory_gib


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What was measured.

    Attributes:
        groups: Which images share a prompt, (N,) int64.
        totals: Scores of the images, (N,).
        again: The same images scored once more in the opposite order, so that no random numbers repeat, (N,).
        round_trip: After the VAE's encoder and decoder, (N,); None where the pipeline cannot encode.
        jpeg: After JPEG of quality 90, (N,).
        quiet: Of the images of the same seeds that the evaluation's sampler makes, or without noise where that is
            training's, (N,); None where training has no noise either.
        sharper: log of an image's sharpness over that of the quiet one, (N,); None likewise.
        cosine: Between g_A and g_B; NaN where one is 0.
        moved: KL of each step that one epoch's updates moved, mean over images, (T,) nats; None without noise.
        drift: Mean |log-prob recomputed - sampled| of each step, (T,) nats; None where nothing is recomputed.
        dims: D.
        seconds: Of an epoch of N images, by phase.
        memory_gib: Peak so far.
        device_gib: What the device has; None for the CPU.
    """

    groups: Tensor
    totals: Tensor
    again: Tensor
    round_trip: Tensor | None
    jpeg: Tensor
    quiet: Tensor | None
    sharper: Tensor | None
    cosine: float
    moved: Tensor | None
    drift: Tensor | None
    dims: int
    seconds: dict[str, float]
    memory_gib: float
    device_gib: float | None


def reduced(config: Config, num_images: int, folder: Path) -> Config:
    """The configuration of a checkup: few images, whole groups of them, the peak rate, and nothing but the update.

    Raises:
        UserError: It learns from judged images, which are neither sampled nor scored.
    """
    if config.offline is not None:
        raise UserError("doctor CONFIG samples and scores images, and offline has them judged already; start the run")
    size = config.batch.group_size
    images = size * max(2, math.ceil(num_images / size))
    batch = replace(
        config.batch, samples_per_epoch=images, sample_batch_size=min(config.batch.sample_batch_size, images)
    )
    return replace(
        config,
        batch=batch,
        optimizer=replace(config.optimizer, schedule="constant", warmup_updates=0),
        evaluation=EvaluationConfig(every_epochs=0, num_prompts=1, sampler=config.evaluation.sampler),
        checkpoints=CheckpointConfig(every_epochs=0),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        run=replace(config.run, name="checkup", output_dir=str(folder)),
        max_minutes=None,
        gate_tolerance=1e9,
    )


def take(config: Config, loaded: Loaded, processes: Processes) -> Readings:
    """Measures a reduced configuration; the policy's weights are changed by it.

    Args:
        config: As `reduced` gives it.
        loaded: What it names, or what is to be checked in its place.
        processes: This process alone.
    """
    with tempfile.TemporaryDirectory() as folder, scoring_threads(1) as threads:
        run = RunFolder.create(folder, "checkup", to_yaml(config, full=True))
        session = make_session(config, loaded, processes, run)
        return _take(session, threads)


def _take(session: Session, threads: ThreadPoolExecutor) -> Readings:
    state, plan, config = session.state, session.plan, session.state.config
    processes, progress = session.processes, session.progress
    values = critic_of(state, plan, processes=processes)
    source = online(state, plan, threads=threads, processes=processes, progress=progress, values=values)
    update = updater(state, plan, processes=processes, progress=progress)
    first = source(0, Stopwatch(state.policy.device))
    clock = Stopwatch(state.policy.device)
    second = source(1, clock)
    one, two = (_gradient(update, data, epoch=epoch) for epoch, data in enumerate((first, second)))
    images = _images(state.policy, first.samples.trajectory.final, config.batch.sample_batch_size)
    quiet = _quiet_images(session, first)
    with clock("train"):
        report = update(second.experience, epoch=1)
    backwards = list(reversed(range(len(images))))
    return Readings(
        groups=torch.arange(plan.images_per_epoch) // plan.group_size,
        totals=_score(session, first, images).total,
        again=_score(session, first, images, order=backwards).total.flip(0),
        round_trip=_round_trip(session, first, images),
        jpeg=_score(session, first, compressed(images)).total,
        quiet=None if quiet is None else _score(session, first, quiet).total,
        sharper=None if quiet is None else (sharpness(images) / sharpness(quiet)).log(),
        cosine=_cosine(one, two),
        moved=_moved(session, first),
        drift=report.drift,
        dims=first.samples.trajectory.final[0].numel(),
        seconds=dict(clock.seconds),
        memory_gib=memory_gib(state.policy.device),
        device_gib=_device_gib(state.policy.device),
    )


def _images(policy: Policy, latents: Tensor, size: int) -> Tensor:
    """Decoded, (N, 3, H, W) on the CPU."""
    return torch.cat([policy.decode(part.to(policy.device)).cpu() for part in latents.split(size)])


def _score(session: Session, data: Collected, images: Tensor, *, order: Sequence[int] | None = None) -> Scores:
    """Scores images in place of an epoch's own, by the scales that this epoch has set.

    Args:
        session: Whose reward.
        data: The epoch.
        images: (N, 3, H, W), in the epoch's order.
        order: In which they are scored, whole groups together; None for the epoch's.
    """
    samples, size = data.samples, session.plan.group_size
    order = range(len(images)) if order is None else order
    return session.state.reward(
        images[list(order)].to(session.state.policy.device),
        [samples.prompts[i] for i in order],
        [samples.metadata[i] for i in order],
        [i // size for i in order],
    )


def _round_trip(session: Session, data: Collected, images: Tensor) -> Tensor | None:
    back = encoded(session.state.policy, images, session.state.config.batch.sample_batch_size)
    return None if back is None else _score(session, data, back).total


def _quiet_images(session: Session, data: Collected) -> Tensor | None:
    """Images of the same prompts and seeds by the evaluation's sampler, or without noise where that is training's."""
    policy, config = session.state.policy, session.state.config
    if not policy.schedule.stochastic_steps:
        return None
    other = session.evaluation_policy if config.evaluation_sampler != config.sampler else policy.noise_free
    return _sampled(session, other, data, with_kl=False)[0]


def _moved(session: Session, data: Collected) -> Tensor | None:
    """The KL of each step to the pretrained model, measured at every step of new chains of the trained one."""
    if not session.state.policy.schedule.stochastic_steps:
        return None
    _, kl = _sampled(session, session.state.policy, data, with_kl=True)
    return kl


def _sampled(session: Session, policy: Policy, data: Collected, *, with_kl: bool) -> tuple[Tensor, Tensor | None]:
    """Images (N, 3, H, W) of the epoch's prompts and seeds on the CPU, and the mean KL of each step, (T,) nats."""
    config, count = session.state.config, len(data.prompts)
    seeds = sample_seeds(config.seed, 0, range(count))
    images, kl = [], []
    for start in range(0, count, config.batch.sample_batch_size):
        part = slice(start, start + config.batch.sample_batch_size)
        samples = sample_images(policy, data.prompts[part], seeds[part], with_kl=with_kl)
        images.append(policy.decode(samples.trajectory.final).cpu())
        kl += [] if samples.trajectory.kl is None else [samples.trajectory.kl.cpu()]
    return torch.cat(images), torch.cat(kl).mean(0) if kl else None


# ---- gradients -------------------------------------------------------------------------------------------------------


def _gradient(update: Updater, data: Collected, *, epoch: int) -> list[Tensor]:
    """The gradient of an epoch's loss at the present weights, which stay: the sum over its updates, on the CPU."""
    found: list[Tensor] = []
    replace(update, rule=_adding_to(found))(data.experience, epoch=epoch)
    return found


def _adding_to(found: list[Tensor]) -> StepRule:
    """A step rule that takes no step, and adds the gradients up."""

    def rule(learners: Sequence[Learner], update: Update) -> dict[str, StepReport]:
        update.accumulate()
        learner = learners[0]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in learner.parameters.values()]
        found[:] = [part.float().cpu() + (found[i] if found else 0) for i, part in enumerate(parts)]
        learner.optimizer.zero_grad(set_to_none=True)
        return {learner.name: StepReport(grad_norm=None, learning_rate=0.0)}

    return rule


def _cosine(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """NaN where a gradient is 0 or not finite."""
    dot = sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(one, two, strict=True))
    norms = [math.sqrt(sum(float(p.square().sum(dtype=torch.float64)) for p in parts)) for parts in (one, two)]
    return dot / (norms[0] * norms[1]) if norms[0] * norms[1] > 0 else math.nan


def _device_gib(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
