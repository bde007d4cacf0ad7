"""Binds the verbs of an epoch to a run's state."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo import Samples
from ddpo.curvature import FisherProducts
from ddpo.objectives import Experience, Models
from ddpo.steered import Steering
from rewards import Scores
from trainers.epoch.credit import Credit, CreditRules, credit
from trainers.epoch.critic import ValueLearner, value_learner
from trainers.epoch.learning_rate import schedule_updates
from trainers.epoch.path_kl import EpochKL
from trainers.epoch.regularization import Regularizer
from trainers.epoch.sample import Sampler
from trainers.epoch.score import score
from trainers.epoch.score_gradient import ScoreGradient
from trainers.epoch.state import TrainState
from trainers.epoch.step_rules import adamw
from trainers.epoch.trust_region import trust_region
from trainers.epoch.update import Updater
from trainers.parallel.processes import Processes
from trainers.planning.plan import BatchPlan
from trainers.prompts import Prompt
from trainers.scoring.steering_reward import steering_reward
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.progress import Progress, say


@dataclass(frozen=True, kw_only=True)
class Collected:
    """An epoch's data.

    Attributes:
        prompts: Of all N samples of the epoch.
        experience: Of which an objective learns, of this process.
        scores: Of all N samples: totals of the rewards alone, and components; None where no reward has scored them.
        kl: To the pretrained model; None where it is not measured.
        credit: What the rewards' scores are worth; None where there are none.
    """

    prompts: tuple[Prompt, ...]
    experience: Experience
    scores: Scores | None = None
    kl: EpochKL | None = None
    credit: Credit | None = None

    @property
    def samples(self) -> Samples:
        """Of this process."""
        return self.experience.samples


Source = Callable[[int, Stopwatch], Collected]
"""Makes an epoch's data, given the number of finished epochs; takes the time of its phases."""


def online(
    state: TrainState,
    plan: BatchPlan,
    *,
    threads: ThreadPoolExecutor,
    processes: Processes,
    progress: Progress,
    values: ValueLearner | None = None,
) -> Source:
    """Data that the policy samples itself.

    Args:
        state: The run; its prompt position, reward scales and remembered scores move on.
        plan: Sizes of an epoch.
        threads: In which rewards run.
        processes: Who shares an epoch.
        progress: Shows the batches.
        values: The critic; None for none.
    """
    config = state.config
    sample = Sampler(
        policy=state.policy,
        old=state.old if config.demand.samples_from_old else None,
        demand=config.demand,
        plan=plan,
        predict_at=config.shaping.steps,
        kl_of_all=config.measures_kl,
        follows_kl=config.follows_kl,
        group_noise="shared" if config.demand.same_start else config.batch.group_noise,
        steering=_steering(state, threads),
        keep_on=config.batch.trajectories,
        distributed=config.distributed,
        seed=config.seed,
        processes=processes,
        progress=progress,
        reader=None if values is None else values.reader,
        videos=state.reward.scores_videos,
    )
    rules = CreditRules(
        reward=state.reward,
        multipliers=state.multipliers,
        estimator=state.advantages,
        shaping_strength=config.shaping.strength,
        warmup_epochs=config.critic.warmup_epochs,
        paired=config.batch.group_noise == "antithetic",
    )

    def source(epoch: int, clock: Stopwatch) -> Collected:
        prompts = tuple(prompt for prompt in state.prompts.draw(plan.groups_per_epoch) for _ in range(plan.group_size))
        scored = score(
            sample(prompts, epoch=epoch, clock=clock),
            reward=state.reward,
            glimpses=[*config.shaping.steps, *sample.contests],
            prompts=[prompt.text for prompt in prompts],
            epoch=epoch,
            group_size=plan.group_size,
            threads=threads,
            processes=processes,
            clock=clock,
        )
        with clock("sample"):
            kl = sample.path_kl(scored.samples.trajectory)
        with clock("critic") if values is not None else nullcontext():
            outcome = None if values is None else values.outcome(scored, kl)
        credited = credit(
            scored,
            kl,
            rules=rules,
            alpha=state.kl_weight(scored.scores.total),
            epoch=epoch,
            groups=torch.arange(len(prompts)) // plan.group_size,
            prompts=[prompt.group for prompt in prompts],
            own=processes.share(len(prompts)),
            outcome=outcome,
        )
        return Collected(prompts=prompts, experience=credited.experience, scores=scored.scores, kl=kl, credit=credited)

    return source


def critic_of(state: TrainState, plan: BatchPlan, *, processes: Processes) -> ValueLearner | None:
    """How a run's critic learns; None without one. Arguments as for `online`."""
    if state.critic is None:
        return None
    return value_learner(state.config, state.policy, state.critic, state.learners[-1], plan, processes)


def _steering(state: TrainState, threads: ThreadPoolExecutor) -> Steering | None:
    """How samples are steered; its scores are made in the rewards' threads, in turn with those of finished images."""
    config = state.config
    if config.steer is None:
        return None
    total = steering_reward(state.reward, epoch=lambda: state.epoch)

    def score(images: Tensor, prompts: list[str], metadata: list[Mapping[str, object]]) -> Tensor:
        return threads.submit(total, images, prompts, metadata).result()

    return Steering(kind=config.steer, reward=score, batch_size=config.batch.sample_batch_size)


def updater(
    state: TrainState,
    plan: BatchPlan,
    *,
    processes: Processes,
    progress: Progress,
    regularizer: Regularizer | None = None,
) -> Updater:
    """What takes a run's optimizer steps; arguments as for `online`, and what holds the weights to the start."""
    config = state.config

    score = ScoreGradient(state.reward, epoch=lambda: state.epoch, processes=processes, progress=progress)
    differentiated = score if config.demand.reward_gradient else None

    def elapsed() -> float:
        if config.max_minutes is None or config.optimizer.schedule == "constant":
            return 0.0
        seconds = processes.gather_json(state.counts.seconds)[0]
        assert isinstance(seconds, float)
        return seconds / (60 * config.max_minutes)

    curved, total = config.optimizer.is_trust_region, schedule_updates(config, plan.optimizer_steps_per_epoch)
    return Updater(
        objective=config.objective.build(),
        score=differentiated,
        preparation=state.preparation,
        models=Models(policy=state.policy, old=state.old, score=differentiated),
        learners=(state.learner,),
        rule=trust_region(config.optimizer)
        if curved
        else adamw(config.optimizer, scaler=state.scaler, total=total, elapsed=elapsed),
        products=FisherProducts(policy=state.policy, tell=_teller(processes)) if curved else None,
        scaler=state.scaler,
        plan=plan,
        distributed=config.distributed,
        gate_tolerance=config.gate_tolerance_nats,
        seed=config.seed,
        processes=processes,
        progress=progress,
        regularizer=regularizer,
    )


def _teller(processes: Processes) -> Callable[[str], None]:
    """Says a line on the terminal, on the main process."""
    return say if processes.is_main else lambda text: None
