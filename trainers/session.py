"""Sets up a run: its folder, rewards, prompts, policy and state, at the start or at a checkpoint."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ddpo import Policy
from ddpo.seeds import NOISE
from ddpo.validation import UserError, within
from rewards import WeightedSum
from trainers.config import Config
from trainers.config.io import to_yaml
from trainers.diagnosis.watch import Watch
from trainers.epoch.learning_rate import schedule_notice
from trainers.epoch.state import TrainState
from trainers.evaluation.evaluator import Evaluator, evaluation_prompts
from trainers.evaluation.spread import spread_of
from trainers.offline.read import images_of, load_judged
from trainers.parallel.agreement import check_same_weights, on_main
from trainers.parallel.processes import Processes
from trainers.parallel.rng import seed_rng
from trainers.parallel.sharding import distribute
from trainers.planning.memoryless import memory_notice
from trainers.planning.plan import BatchPlan, check_judged, check_whole_groups, make_plan
from trainers.planning.policy_loading import check_unseen_steps, count_decisions, load_policy
from trainers.planning.rounding import rounding_notice
from trainers.prompts import Prompt, PromptStream, load_prompts
from trainers.run_folder.checkpoint import (
    checkpoint_epoch,
    discard_after,
    load_checkpoint,
)
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.husks import make_way, sweep
from trainers.run_folder.model_record import record_model
from trainers.run_folder.prompt_record import record_prompts
from trainers.run_folder.python_runs import record_objects
from trainers.run_folder.reward_record import record_rewards
from trainers.scoring.loading import load_rewards
from trainers.scoring.steering_reward import check_steering_reward
from trainers.tracking.progress import Progress
from trainers.tracking.tracker import Tracker, open_trackers

_STEM_LETTERS = 100  # of a configuration's or reward's name in that of a run
_OTHER_NOISE = (
    "NOTE: the checkpoint is of a version that drew other noise from the same seed: the run goes on with new noise and "
    "a new order of prompts, and its earlier evaluations show other pictures than the later ones"
)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a run is made of, read from a configuration or handed over from Python.

    Attributes:
        policy: At its pretrained weights.
        reward: What is optimised.
        heldout: What is only measured; None for nothing.
        prompts: Training prompts, or judged images with theirs.
        evaluation_prompts: Where the evaluation's prompts are taken from.
        objects: Handed over from Python: what of it no command can make again (`trainers.run_folder.python_runs`); None
            where all of it was read from a configuration.
    """

    policy: Policy
    reward: WeightedSum
    heldout: WeightedSum | None
    prompts: Sequence[Prompt]
    evaluation_prompts: Sequence[Prompt]
    objects: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a run needs besides its state; nothing here changes.

    Attributes:
        run: The run folder.
        state: The run's state.
        plan: Sizes of an epoch.
        processes: Who shares the run.
        progress: Bars.
        evaluator: The fixed evaluation set.
        evaluation_policy: The policy as evaluations sample from it; its weights are the state's.
        heldout: Rewards that are only measured; None for none.
        tracker: Where metrics go besides the run folder.
        watch: Looks at the metrics of every epoch; of the main process.
    """

    run: RunFolder
    state: TrainState
    plan: BatchPlan
    processes: Processes
    progress: Progress
    evaluator: Evaluator
    evaluation_policy: Policy
    heldout: WeightedSum | None
    tracker: Tracker
    watch: Watch


def create_run(config: Config, processes: Processes, *, yaml: str, stem: str | None = None) -> RunFolder:
    """Makes the folder on the main process and tells the others its name.

    Args:
        config: The run's configuration.
        processes: Who shares the run.
        yaml: The configuration's text.
        stem: What the name of an unnamed run ends with; None takes the first reward.
    """
    if stem is None:
        stem = Path(config.rewards[0].shown).name.replace(":", "-") if config.rewards else "run"
    short = stem[:_STEM_LETTERS]
    made = on_main(lambda: _created(config, yaml, stem=short), processes)
    path = processes.gather_json(made and str(made.path))[0]
    assert isinstance(path, str)
    return made or RunFolder(path=Path(path))


def _created(config: Config, yaml: str, *, stem: str) -> RunFolder:
    """A new folder, in place of one of the same name that never finished an epoch."""
    sweep(config.run.folder)
    notice = None if config.run.name is None else make_way(config.run.folder / config.run.name)
    if notice is not None:
        Progress(enabled=True).line(notice)
    return RunFolder.create(config.run.folder, config.run.name, yaml, stem=stem)


def training_entries(config: Config) -> list[Prompt]:
    """What an epoch draws from: prompts, or judged images with theirs."""
    return load_prompts(config.prompts) if config.offline is None else load_judged(config.offline)


def prepare(config: Config, processes: Processes) -> Loaded:
    """Loads what a configuration names; the policy is at its pretrained weights."""
    seed_rng(config.seed, processes.rank)
    reward, heldout = load_rewards(config, processes)
    prompts, evaluation = training_entries(config), evaluation_prompts(config)
    policy = load_policy(config, str(processes.device))
    return Loaded(policy=policy, reward=reward, heldout=heldout, prompts=prompts, evaluation_prompts=evaluation)


def make_session(
    config: Config,
    loaded: Loaded,
    processes: Processes,
    run: RunFolder,
    *,
    source: Path | None = None,
    planned: BatchPlan | None = None,
    accept: Collection[str] = (),
) -> Session:
    """Plans a run of what is loaded and opens its trackers.

    Args:
        config: The run's configuration.
        loaded: What it trains, scores and draws from.
        processes: Who shares the run.
        run: The run folder.
        source: The checkpoint that `restore` will go on from; None at the start.
        planned: The plan that was shown before the pipeline was loaded; None for none.
        accept: What may be another one than the run began with; see `trainers.run_folder.model_record`.
    """
    policy = loaded.policy
    num_stochastic = count_decisions(policy, needed=config.demand.needs_noise)
    if config.demand.contenders and config.demand.contended(num_stochastic) == 0:
        raise UserError(
            f"{config.demand.name} compares next states from objective.first_step on, and only {num_stochastic} steps "
            "of this pipeline have noise; lower first_step or raise sampler.num_steps"
        )
    everything = [*loaded.prompts, *loaded.evaluation_prompts]
    policy.check_inputs([prompt.text for prompt in everything], [prompt.metadata for prompt in everything])
    plan = make_plan(
        config,
        num_processes=processes.count,
        num_stochastic=num_stochastic,
        branches=policy.rule.branches,
        rank=processes.rank,
    )
    if config.demand.chain_unit:
        check_unseen_steps(policy)
    if loaded.reward.groupwise:
        check_whole_groups(plan)
    if config.offline is not None:
        check_judged(plan, len(images_of(loaded.prompts[0])))
    if config.demand.whole_groups:
        check_whole_groups(plan, who="an objective", alone=True)
    progress = Progress(enabled=processes.is_main)
    if config.demand.reward_gradient:
        check_gradient(loaded.reward, name=config.demand.name, every=config.demand.chain_unit, progress=progress)
    if config.steer is not None:
        check_steering_reward(config.steer, loaded.reward)
    rounding = rounding_notice(
        config.model.precision, dims=math.prod(policy.latent_shape), joint_ratio=config.demand.joint_ratio
    )
    memory = memory_notice(policy.schedule) if config.weighs_kl else None
    for notice in (memory, rounding, config.advantages.notice):
        if notice:
            progress.line(notice)
    evaluator = Evaluator(
        config.evaluation,
        loaded.evaluation_prompts,
        batch_size=config.batch.sample_batch_size,
        processes=processes,
        progress=progress,
        spread=spread_of(config.evaluation.spread, policy.device),
    )
    is_fresh = source is None or checkpoint_epoch(source) == 0  # no epoch depends on what was recorded
    accept = (*accept, "model", "prompts") if is_fresh else accept
    is_other = record_model(run.path, policy, config, processes, progress, accept=accept)  # while the network is whole
    if loaded.objects is not None and processes.is_main:
        record_objects(run.path, loaded.objects, loaded.prompts)
    is_other |= record_prompts(run.path, loaded.prompts, evaluator.sources, processes, progress, accept=accept)
    if is_other and processes.is_main:
        run.discard_evaluation(0)
    with within("evaluation"):  # while the network is whole
        evaluation_policy = policy.with_sampler(config.evaluation_sampler, seed=config.seed)
    check_same_weights(policy.components, processes)
    distribute(policy, config.distributed, processes)
    shuffle = (config.prompts if config.offline is None else config.offline).shuffle
    stream = PromptStream(loaded.prompts, seed=config.seed, shuffle=shuffle)
    state = TrainState.start(config, policy, loaded.reward, stream)
    if planned is not None and (plan.num_stochastic, plan.branches) != (planned.num_stochastic, planned.branches):
        progress.line(f"of the plan, now that the pipeline is loaded:\n{plan.describe(shown=planned)}")
    record_rewards(run.path, loaded.reward, loaded.heldout, processes, progress)
    tracker = open_trackers(
        config.tracking.trackers,
        run=run.path,
        project=config.tracking.project,
        config=json.loads(json.dumps(asdict(config))),
        main_process=processes.is_main,
        first_step=0 if source is None else checkpoint_epoch(source) + 1,
    )
    seed_rng(config.seed, processes.rank)  # whatever loading has drawn
    return Session(
        run=run,
        state=state,
        plan=plan,
        processes=processes,
        progress=progress,
        evaluator=evaluator,
        evaluation_policy=evaluation_policy,
        heldout=loaded.heldout,
        tracker=tracker,
        watch=Watch(run, config),
    )


def check_gradient(reward: WeightedSum, *, name: str, every: bool, progress: Progress) -> None:
    """Refuses rewards of which none has derivatives, and says which have none beside others that do.

    Args:
        reward: Of the run.
        name: Of the objective.
        every: Whether every reward with a weight must have derivatives.
        progress: Where it is said.

    Raises:
        UserError: None has, or not every one that must, or one compares images.
    """
    through, without = reward.with_gradient, reward.without_gradient
    if not through:
        raise UserError(
            f"the objective {name} learns through the gradient of the rewards, and {', '.join(without)} must be "
            "differentiable for that, or stand beside one that is; choose another reward or another objective.kind"
        )
    compared = [one.name for one in reward.rewards if one.groupwise and one.name in (*through, *without)]
    if compared:
        raise UserError(
            f"the objective {name} learns from one image at a time, and {', '.join(compared)} must compare no images; "
            "leave it out, or choose another objective.kind"
        )
    if without and every:
        raise UserError(
            f"rewards: {', '.join(without)} must be differentiable with objective.noise_free_steps: pathwise, which "
            "adds the derivative of the whole total; leave it out, or set noise_free_steps: ignored"
        )
    if without:
        progress.line(
            f"{name} learns through {', '.join(through)} alone: {', '.join(without)} counts in the reported total, "
            "has no gradient and trains nothing"
        )


def restore(session: Session, source: Path | None, *, saved: Config) -> None:
    """Puts a session where a checkpoint left it, or at its start, and the run folder's records with it.

    Args:
        session: The run.
        source: The checkpoint; None for the start.
        saved: The configuration in the run folder; where the session's differs, it is kept for the next resume.
    """
    run, processes = session.run, session.processes
    if source is not None:
        tensors, values = load_checkpoint(source)
        session.state.load(tensors, values, processes)
        if values.get("noise") != NOISE:
            session.progress.line(_OTHER_NOISE)
    if processes.is_main:
        run.note_resume("none" if source is None else source.name)
        if (notice := run.restore_metrics(source, after_epoch=session.state.epoch)) is not None:
            session.progress.line(notice)
        discard_after(run.path, session.state.epoch)
        run.discard_evaluations(after_epoch=session.state.epoch)
        if session.state.config != saved:
            run.save_config(to_yaml(session.state.config, full=True))
    where = "the start: there is no checkpoint yet" if source is None else f"{source} after epoch {session.state.epoch}"
    session.progress.line(f"resumed from {where}")
    notice = schedule_notice(
        saved,
        session.state.config,
        update_index=session.state.learner.counts.updates,
        updates_per_epoch=session.plan.optimizer_steps_per_epoch,
    )
    if notice is not None:
        session.progress.line(notice)
    processes.wait()
