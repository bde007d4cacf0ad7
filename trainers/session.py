"""Sets a run up: its folder, rewards, prompts, policy and state; or takes them up again from a checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ddpo import Policy
from rewards import WeightedSum
from trainers.checkpoint import (
    CheckpointError,
    checkpoint_epoch,
    discard_after,
    latest_checkpoint,
    load_checkpoint,
)
from trainers.config import Config
from trainers.config_io import ConfigError, load_config, to_yaml
from trainers.evaluation import Evaluator, evaluation_prompts
from trainers.overoptimisation import discard_evaluations
from trainers.plan import BatchPlan, check_whole_groups, expected_plan, make_plan
from trainers.policies import count_decisions, load_policy
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.prompt_record import record_prompts
from trainers.prompts import Prompt, PromptStream, load_prompts
from trainers.reward_processes import start_rewards
from trainers.reward_record import record_rewards
from trainers.run import CONFIG, RunFolder
from trainers.sharding import distribute
from trainers.state import TrainState
from trainers.tracking import Tracker, open_trackers


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
        evaluated: The policy as evaluations sample from it; its weights are the state's.
        heldout: Rewards that are only measured; None for none.
        tracker: Where metrics go besides the run folder.
    """

    run: RunFolder
    state: TrainState
    plan: BatchPlan
    processes: Processes
    progress: Progress
    evaluator: Evaluator
    evaluated: Policy
    heldout: WeightedSum | None
    tracker: Tracker


def create_run(config: Config, processes: Processes, *, yaml: str, stem: str | None = None) -> RunFolder:
    """Makes the folder on the main process and tells the others its name.

    Args:
        config: The run's configuration.
        processes: Who shares the run.
        yaml: The configuration's text.
        stem: What an unnamed run is called after; None takes the first reward.
    """
    if stem is None:
        stem = config.rewards[0].shown.replace(":", "-").replace("/", "-") if config.rewards else "run"
    made = RunFolder.create(config.run.folder, config.run.name, yaml, stem=stem) if processes.is_main else None
    path = processes.gather_json(made and str(made.path))[0]
    assert isinstance(path, str)
    return made or RunFolder(path=Path(path))


def load_session(config: Config, processes: Processes, run: RunFolder, first_step: int) -> Session:
    """Loads rewards, prompts and the policy of a configuration."""
    device = str(processes.device)
    if config.reward_processes.devices:
        reward, heldout = start_rewards(config, processes)
    else:
        reward, heldout = WeightedSum(config.terms, device=device), load_heldout(config, device)
    texts, evaluated = load_prompts(config.prompts), evaluation_prompts(config)
    policy = load_policy(config, device)
    return make_session(config, policy, reward, heldout, texts, evaluated, processes, run, first_step=first_step)


def load_heldout(config: Config, device: str) -> WeightedSum | None:
    """The rewards that are only measured; None for none."""
    return WeightedSum(config.heldout_rewards, device=device) if config.heldout_rewards else None


def make_session(
    config: Config,
    policy: Policy,
    reward: WeightedSum,
    heldout: WeightedSum | None,
    prompts: Sequence[Prompt],
    evaluated: Sequence[Prompt],
    processes: Processes,
    run: RunFolder,
    *,
    first_step: int,
) -> Session:
    """Plans a run of a loaded policy and opens its trackers.

    Args:
        config: The run's configuration.
        policy: At its pretrained weights.
        reward: What is optimised.
        heldout: What is only measured.
        prompts: Training prompts.
        evaluated: Where the evaluation's prompts are taken from.
        processes: Who shares the run.
        run: The run folder.
        first_step: First epoch that trackers will see.
    """
    num_stochastic = count_decisions(policy)
    if heldout is None and config.evaluation.stop_on_overoptimisation:
        raise ValueError(
            "evaluation.stop_on_overoptimisation needs held-out rewards, which show over-optimisation; got none"
        )
    everything = [*prompts, *evaluated]
    policy.check_inputs([prompt.text for prompt in everything], [prompt.metadata for prompt in everything])
    plan = make_plan(
        config,
        num_processes=processes.count,
        num_stochastic=num_stochastic,
        branches=policy.rule.branches,
        rank=processes.rank,
    )
    if reward.groupwise:
        check_whole_groups(plan)
    progress = Progress(enabled=processes.is_main)
    evaluator = Evaluator(
        config.evaluation,
        evaluated,
        batch_size=config.batch.sample_batch_size,
        processes=processes,
        progress=progress,
    )
    record_prompts(run.path, prompts, evaluator.sources, processes, progress)
    evaluation_policy = policy.with_sampler(config.evaluation_sampler, seed=config.seed)  # while the network is whole
    distribute(policy, config.distributed, processes)
    stream = PromptStream(prompts, seed=config.seed, shuffle=config.prompts.shuffle)
    state = TrainState.start(config, policy, reward, stream)
    expected = expected_plan(config, num_processes=processes.count, rank=processes.rank)
    if plan != replace(expected, steps_known=True, rows_known=True):
        progress.line(f"the plan, now that the pipeline is loaded:\n{plan.describe()}")
    record_rewards(run.path, reward, heldout, processes, progress)
    return Session(
        run=run,
        state=state,
        plan=plan,
        processes=processes,
        progress=progress,
        evaluator=evaluator,
        evaluated=evaluation_policy,
        heldout=heldout,
        tracker=open_trackers(
            config.tracking.trackers,
            run=run.path,
            project=config.tracking.project,
            config=json.loads(json.dumps(asdict(config))),
            main_process=processes.is_main,
            first_step=first_step,
        ),
    )


def checkpoint_to_resume(run: RunFolder, checkpoint: str | None) -> Path:
    """The checkpoint folder of that name, or the newest; `CheckpointError` when there is none yet."""
    source = latest_checkpoint(run.path) if checkpoint is None else run.checkpoints / checkpoint
    if source is None:
        raise CheckpointError(
            f"{run.path} has no checkpoint yet; the first comes after checkpoints.every_epochs epochs"
        )
    return source


def check_epochs(config: Config, source: Path | None) -> None:
    """Refuses a configuration that ends before the checkpoint to go on from.

    Raises:
        ConfigError: It does.
    """
    done = 0 if source is None or not source.is_dir() else checkpoint_epoch(source)
    if done > config.epochs:
        raise ConfigError(
            f"epochs must be at least {done}, which {source} has finished, got {config.epochs}; give more with "
            f"--epochs, or go on from an earlier one with --checkpoint"
        )


def restore(session: Session, source: Path | None) -> None:
    """Puts a session where a checkpoint left it, or at its start, and the run folder's records with it.

    What was changed in the configuration is kept for the next resume.
    """
    run, processes = session.run, session.processes
    if source is not None:
        session.state.load(*load_checkpoint(source), processes)
    if processes.is_main:
        run.note_resume("none" if source is None else source.name)
        run.truncate_metrics(session.state.epoch)
        discard_after(run.path, session.state.epoch)
        discard_evaluations(run.evaluations, session.state.epoch)
        if session.state.config != load_config(run.path / CONFIG):
            run.save_config(to_yaml(session.state.config, full=True))
    where = "the start: there is no checkpoint yet" if source is None else f"{source} after epoch {session.state.epoch}"
    session.progress.line(f"resumed from {where}")
    processes.wait()
