"""The first half of an epoch: sample, decode, score, and turn scores into advantages.

N samples per epoch over all processes, in groups of G per prompt: sample i has group i // G, and seed (run, epoch, i).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo import Experience, Policy, Trajectory, path_kl, rollout, sample_seeds
from ddpo.advantages import Advantages
from rewards import RewardError, Scores
from trainers.metrics import Stopwatch
from trainers.plan import KL_SAMPLES, BatchPlan
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.scoring import Scorer, fail_together
from trainers.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Collected:
    """An epoch's experience, and what is shown of it.

    Attributes:
        experience: This process's samples.
        scores: Of all processes' samples; totals (N,) and components.
        advantages: Of all processes' samples.
        path_kl: Mean path KL to the pretrained model, nats.
        kl_per_step: Mean KL of each step, (T,) nats.
        images: This process's first images for pictures, (n, 3, H, W) on the CPU.
        prompts: Of all N samples.
    """

    experience: Experience
    scores: Scores
    advantages: Advantages
    path_kl: float
    kl_per_step: Tensor
    images: Tensor
    prompts: tuple[str, ...]


def collect(
    state: TrainState, plan: BatchPlan, processes: Processes, scorer: Scorer, progress: Progress, clock: Stopwatch
) -> Collected:
    """Samples and scores one epoch.

    Args:
        state: The run; its prompt position and reward statistics move on.
        plan: Sizes of the epoch.
        processes: Who shares it.
        scorer: Scores in the background.
        progress: Shows the batches.
        clock: Takes the seconds of `sample`, `decode` and `reward`.

    Raises:
        RewardError: A reward failed; the message names it, the prompt and the sample.
    """
    config = state.config
    penalised = state.alpha > 0
    guided = config.objective.train_guidance == "same"
    drawn = [prompt for prompt in state.prompts.draw(plan.groups_per_epoch) for _ in range(plan.group_size)]
    own = processes.share(len(drawn))
    parts: list[Trajectory] = []
    pictures: list[Tensor] = []
    start = own.start
    if config.model.offload:  # the text encoder moves to the device and back once, not for every batch
        with clock("sample"):
            state.policy.encode([prompt.text for prompt in drawn[own.start : own.stop]])
    for size in progress.track(plan.sample_batches, "sampling"):
        batch = drawn[start : start + size]
        with clock("sample"):
            condition = state.policy.encode([prompt.text for prompt in batch], [prompt.metadata for prompt in batch])
            seeds = sample_seeds(config.seed, state.epoch, range(start, start + size))
            parts.append(rollout(state.policy, condition, seeds, with_kl=penalised, guided=guided))
        with clock("decode"):
            images = state.policy.decode(parts[-1].final)
        if config.batch.trajectories == "cpu":
            parts[-1] = parts[-1].kept_on_cpu()
        scorer.submit(images, condition.prompts, condition.metadata)
        if len(pictures) * size < config.tracking.num_pictures:
            pictures.append(images.cpu())
        start += size
    trajectory = Trajectory.concatenate(parts)
    with clock("sample"):
        kl = trajectory.kl if penalised else _measured_kl(state.policy, trajectory, guided=guided)
    assert kl is not None
    with clock("reward"):
        scores = _gather_scores(_collect_scores(scorer, processes), processes)
    state.reward.update(scores.components)
    scores = Scores(total=state.reward.total(scores.components), components=scores.components)
    everyones_kl = processes.gather(kl).cpu()
    groups = torch.arange(len(drawn)) // plan.group_size
    advantages = state.advantages(
        scores.total,
        groups,
        [prompt.text for prompt in drawn],
        kl=everyones_kl if penalised else None,
        alpha=state.alpha,
        num_steps=trajectory.schedule.num_steps,
    )
    rows = slice(own.start, own.stop)
    device = state.policy.device
    return Collected(
        experience=Experience(
            trajectory=trajectory,
            scores=scores.total[rows],
            components={name: values[rows] for name, values in scores.components.items()},
            advantages=advantages.values[rows].to(device),
            kl_weight=advantages.kl_weight[rows].to(device),
            groups=groups[rows],
            penalised=penalised,
        ),
        scores=scores,
        advantages=advantages,
        path_kl=float(everyones_kl.sum(1).mean()),
        kl_per_step=everyones_kl.mean(0),
        images=torch.cat(pictures)[: config.tracking.num_pictures],
        prompts=tuple(prompt.text for prompt in drawn),
    )


def _measured_kl(policy: Policy, trajectory: Trajectory, *, guided: bool) -> Tensor:
    return path_kl(policy, trajectory.first(KL_SAMPLES).to(policy.device), guided=guided)


def _collect_scores(scorer: Scorer, processes: Processes) -> Scores:
    """This process's scores; a reward that fails on any process ends the run on all, with the same message."""
    scores, failure = None, None
    try:
        scores = scorer.collect()
    except RewardError as error:
        failure = error
    fail_together(processes, failure)
    assert scores is not None
    return scores


def _gather_scores(scores: Scores, processes: Processes) -> Scores:
    components = {name: processes.gather(values) for name, values in scores.components.items()}
    return Scores(total=processes.gather(scores.total), components=components)
