"""The first half of an epoch: sample, decode, score, and turn scores into advantages.

N samples per epoch over all processes, in groups of G per prompt: sample i has group i // G, and seed (run, epoch, i).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ddpo import Condition, Experience, Policy, Trajectory, path_kl, rollout, sample_seeds
from ddpo.advantages import Advantages, Part
from rewards import RewardError, Scores
from rewards.base import check_components
from trainers.decoded import find_non_finite
from trainers.metrics import Stopwatch
from trainers.objective import Pressure, explained, objective_scores, potential, pressure
from trainers.pictures import spread
from trainers.plan import BatchPlan, kl_samples
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.scoring import Scorer, fail_together
from trainers.sharding import gathered
from trainers.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Collected:
    """An epoch's experience, and what is shown of it.

    Attributes:
        experience: This process's samples.
        scores: Of all processes' samples; totals (N,) of the rewards alone, and components.
        constraints: What the constraints measured and added.
        alpha: KL weight that was used, reward units per nat.
        shaping: Share of the variance of the scores that the last intermediate reward explains; NaN without shaping.
        advantages: Of all processes' samples.
        path_kl: Mean path KL to the pretrained model, nats.
        kl_per_step: Mean KL of each step, (T,) nats.
        shown: Which of this process's samples are for pictures, evenly over them.
        images: Theirs, (len(shown), 3, H, W) on the CPU.
        prompts: Of all N samples.
    """

    experience: Experience
    scores: Scores
    constraints: Pressure
    alpha: float
    shaping: float
    advantages: Advantages
    path_kl: float
    kl_per_step: Tensor
    shown: list[int]
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
        RewardError: A reward failed; the message names it, the prompt and the sample. Or images were not finite.
        Interrupted: A signal has reached some process.
    """
    config = state.config
    state.policy.begin_epoch(state.epoch, seed=config.seed)
    state.reward.epoch = state.epoch
    measured = config.weighs_kl
    guided = config.objective.train_guidance == "same"
    drawn = [prompt for prompt in state.prompts.draw(plan.groups_per_epoch) for _ in range(plan.group_size)]
    own = processes.share(len(drawn))
    shown = spread(len(own), config.tracking.num_pictures)
    parts: list[Trajectory] = []
    pictures: list[Tensor] = []
    start = own.start
    failure: RewardError | None = None
    if config.model.offload:  # the text encoder moves to the device and back once, not for every batch
        with clock("sample"):
            everyone = drawn[own.start : own.stop]
            state.policy.encode([prompt.text for prompt in everyone], [prompt.metadata for prompt in everyone])
    for size in progress.track(plan.sample_batches, "sampling"):
        processes.safe_point("sampling")
        if size == 0:
            continue
        batch = drawn[start : start + size]
        with clock("sample"):
            condition = state.policy.encode([prompt.text for prompt in batch], [prompt.metadata for prompt in batch])
            seeds = sample_seeds(config.seed, state.epoch, range(start, start + size))
            with gathered(state.policy, config.distributed):
                parts.append(rollout(state.policy, condition, seeds, with_kl=measured, guided=guided))
        with clock("decode"):
            images = state.policy.decode(parts[-1].final)
        failure = failure or _submit(scorer, images, parts[-1].final, condition)
        for k in config.shaping.steps:
            failed = _submit_prediction(state, scorer, parts[-1], k, clock)
            failure = failure or failed
        if config.batch.trajectories == "cpu":
            parts[-1] = parts[-1].kept_on_cpu()
        first = start - own.start
        pictures.append(images[[row - first for row in shown if first <= row < first + size]].cpu())
        start += size
    fail_together(processes, failure)
    trajectory = Trajectory.concatenate(parts)
    with clock("sample"):
        kl = trajectory.kl if measured else _measured_kl(state.policy, trajectory, processes, guided=guided)
    assert kl is not None
    with clock("reward"):
        scores = _gather_scores(_collect_scores(scorer, processes), processes)
        by_step = {k: _gather_scores(_collect_scores(scorer, processes, k), processes) for k in config.shaping.steps}
    texts = tuple(prompt.text for prompt in drawn)
    state.reward.update(scores.components, texts)
    scores = Scores(total=state.reward.total(scores.components, texts), components=scores.components)
    everyones_kl = processes.gather(kl).cpu()
    num_steps = trajectory.schedule.num_steps
    under = pressure(state.multipliers, state.reward, scores, path_kl=float(everyones_kl.sum(1).mean()))
    objective = objective_scores(state.multipliers, state.reward, scores, texts, under)
    shaping = potential(
        by_step, state.multipliers, state.reward, texts, under, strength=config.shaping.strength, num_steps=num_steps
    )
    alpha = state.alpha + under.alpha
    groups = torch.arange(len(drawn)) // plan.group_size
    advantages = state.advantages(
        objective,
        groups,
        [prompt.group for prompt in drawn],
        kl=everyones_kl if measured else None,
        alpha=alpha,
        num_steps=num_steps,
        parts=[Part(weight, scores.components[name]) for name, weight in state.reward.weights().items() if weight],
        potential=shaping,
    )
    rows = slice(own.start, own.stop)
    device = state.policy.device
    return Collected(
        experience=Experience(
            trajectory=trajectory,
            scores=scores.total[rows],
            advantages=advantages.values[rows].to(device),
            kl_weight=advantages.kl_weight[rows].to(device),
            groups=groups[rows],
            penalised=alpha > 0,
        ),
        scores=scores,
        constraints=under,
        alpha=alpha,
        shaping=explained(objective, shaping),
        advantages=advantages,
        path_kl=float(everyones_kl.sum(1).mean()),
        kl_per_step=everyones_kl.mean(0),
        shown=shown,
        images=torch.cat(pictures),
        prompts=texts,
    )


def _submit(
    scorer: Scorer, images: Tensor, latents: Tensor, condition: Condition, *, queue: int = -1
) -> RewardError | None:
    """Has images scored; returns why not where some are not finite."""
    failure = find_non_finite(images, latents, condition.prompts)
    if failure is None:
        scorer.submit(images, condition.prompts, condition.metadata, queue=queue)
    return failure


@torch.no_grad()
def _submit_prediction(
    state: TrainState, scorer: Scorer, part: Trajectory, k: int, clock: Stopwatch
) -> RewardError | None:
    """Has the clean images that the policy predicts before step k scored, in a queue of their own; see `_submit`."""
    with clock("sample"):
        predicted = state.policy.predicted_x0(k, part.latents[:, k], part.condition)
    with clock("decode"):
        images = state.policy.decode(predicted)
    return _submit(scorer, images, predicted, part.condition, queue=k)


def _measured_kl(policy: Policy, trajectory: Trajectory, processes: Processes, *, guided: bool) -> Tensor:
    return path_kl(policy, trajectory.first(kl_samples(processes.count)).to(policy.device), guided=guided)


def _collect_scores(scorer: Scorer, processes: Processes, queue: int = -1) -> Scores:
    """This process's scores; a reward that fails on any process ends the run on all, with the same message."""
    while processes.largest(not scorer.wait(seconds=0.2, queue=queue)):
        processes.safe_point("rewards")
    scores, failure = None, None
    try:
        scores = scorer.collect(queue)
    except RewardError as error:
        failure = error
    fail_together(processes, failure)
    assert scores is not None
    return scores


def _gather_scores(scores: Scores, processes: Processes) -> Scores:
    """The scores of all processes, which must report the same components."""
    everyones = [cast("list[str]", names) for names in processes.gather_json(list(scores.components))]
    for names in everyones:
        check_components(everyones[0], names)
    components = {name: processes.gather(scores.components[name]) for name in everyones[0]}
    return Scores(total=processes.gather(scores.total), components=components)
