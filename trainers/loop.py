"""The training loop: sample, score, update, log, evaluate, checkpoint.

    prompts -> rollout -> decode -> rewards -> advantages     trainers.collection
            -> objective -> backward -> optimizer             trainers.update

`train` is the Python API; the command line comes in through `train_from_config` and `resume`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from ddpo import Policy
from ddpo.kl import next_alpha
from ddpo.objectives import policy_gradient
from rewards import RewardError, RewardTerm, WeightedSum, as_reward
from trainers.checkpoint import checkpoint_epoch, checkpoint_path, latest_checkpoint, prune
from trainers.collection import Collected, collect
from trainers.config import Config
from trainers.config_io import load_config, load_resumed, to_yaml
from trainers.ending import finish
from trainers.from_python import as_saved, objects_of, read_prompts, record_objects, refuse_objects, with_policy
from trainers.interruption import Interrupted, RunStopped
from trainers.metrics import Stopwatch
from trainers.pictures import caption, grid, with_inputs
from trainers.policies import prepare
from trainers.processes import Processes
from trainers.prompts import Prompt, load_prompts
from trainers.report import epoch_line, epoch_row, scalars, shown_inputs
from trainers.review import due, evaluate, is_overoptimised, lacks_evaluation
from trainers.run import CONFIG, RunFolder
from trainers.run_lock import held
from trainers.scoring import Scorer
from trainers.session import (
    Session,
    check_epochs,
    checkpoint_to_resume,
    create_run,
    load_heldout,
    load_session,
    make_session,
    restore,
)
from trainers.state import TrainState
from trainers.tracking import Picture
from trainers.update import UpdateReport, update

IN_EPOCH = ("sampling", "rewards", "training")


def train(
    policy: Policy,
    *,
    reward: str | Callable[..., object] | WeightedSum,
    prompts: Sequence[str] | Sequence[Prompt] | None = None,
    config: Config | None = None,
    heldout: WeightedSum | None = None,
    resume: Path | None = None,
) -> Path:
    """Fine-tunes a policy.

    Args:
        policy: From `Policy.from_pretrained`; its sampler, adapter, precision and source go into the configuration.
        reward: A registered name, `file.py:name`, a function `(images, prompts, metadata) -> (B,)`, or several as a
            `WeightedSum`; takes the place of the configuration's.
        prompts: Training prompts; also the evaluation's, unless `config.evaluation.prompts` says otherwise. Default
            `config.prompts`.
        config: Everything else; default `Config()`, on resume the run's own.
        heldout: Rewards that are measured and not optimised; default `config.heldout_rewards`.
        resume: Continue this run folder from its newest checkpoint instead of starting a new one.

    Returns:
        The run folder.

    Raises:
        ConfigError: The configuration contradicts the policy, or on resume the run's own.
        RunStopped: On SIGTERM, SIGUSR1 or Ctrl-C, once the last whole epoch is in a checkpoint.
    """
    folder = None if resume is None else RunFolder.open(resume)
    if config is None:
        config = Config() if folder is None else load_config(folder.path / CONFIG)
    config = with_policy(config, policy)
    if config.reward_processes.devices:
        raise ValueError("reward_processes needs rewards by name, from a configuration; train() computes them itself")
    config, texts = read_prompts(config, prompts)
    evaluated = texts if config.evaluation.prompts is None else load_prompts(config.evaluation.prompts)
    if isinstance(reward, str):
        reward = WeightedSum([RewardTerm(name=reward)], device=policy.device)
    total = reward if isinstance(reward, WeightedSum) else WeightedSum.of(as_reward(reward))
    heldout = heldout or load_heldout(config, str(policy.device))
    config = replace(config, rewards=total.terms, heldout_rewards=() if heldout is None else heldout.terms)
    if config.terms != config.rewards:
        missing = ", ".join(term.name for term in config.terms[len(config.rewards) :])
        raise ValueError(f"constraints name {missing}, which the reward lacks; add it to the WeightedSum with weight 0")
    if folder is not None:
        config = as_saved(config, folder)
    objects = objects_of(config, policy, total, heldout)
    processes = Processes(device=policy.device.type)

    def make(run: RunFolder, first_step: int) -> Session:
        prepare(policy, config)
        if processes.is_main:
            record_objects(run.path, objects)
        return make_session(config, policy, total, heldout, texts, evaluated, processes, run, first_step=first_step)

    if folder is not None:
        return _continue(config, processes, folder, make, checkpoint=None)
    return _begin(create_run(config, processes, yaml=to_yaml(config, full=True)), processes, make)


def train_from_config(config: Config, *, config_yaml: str, stem: str | None = None) -> Path:
    """Starts a run from a configuration that passed `trainers.preflight`.

    Args:
        config: The configuration.
        config_yaml: Its text, saved with the run.
        stem: Name of its file without the suffix, after which a run without `run.name` is called.

    Returns:
        The run folder.
    """
    processes = Processes(device=config.model.device)
    run = create_run(config, processes, yaml=config_yaml, stem=stem)
    return _begin(run, processes, partial(load_session, config, processes))


def resume(run: Path, overrides: Sequence[str] = (), *, checkpoint: str | None = None) -> Path:
    """Continues a run exactly where a checkpoint left it.

    Args:
        run: The run folder.
        overrides: `--key value` tokens for keys that may change (epochs, max_minutes, checkpoints.*, tracking.*,
            distributed.*, reward_processes.*); the run folder keeps them for the next resume.
        checkpoint: Name of the checkpoint folder; None takes the newest.

    Returns:
        The run folder.

    A run that was killed before its first checkpoint starts again in its folder.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged; the message names one to use instead.
        ConfigError: The configuration ends before the checkpoint, or another key changes.
        RunError: Another process trains this run, or it was started from Python with objects of its own.
        RunStopped: On a signal, once the last whole epoch is in a checkpoint.
    """
    folder = RunFolder.open(run)
    refuse_objects(folder.path)
    config = load_resumed(folder.path / CONFIG, overrides)
    processes = Processes(device=config.model.device)
    return _continue(config, processes, folder, partial(load_session, config, processes), checkpoint=checkpoint)


def _begin(run: RunFolder, processes: Processes, make: Callable[[RunFolder, int], Session]) -> Path:
    """Trains from the start; a session that cannot be made leaves no folder behind."""
    with held(run, processes):
        try:
            session = make(run, 0)
        except BaseException:
            if processes.is_main:
                run.discard_unused()
            raise
        with closing(session.tracker):
            return _train(session)


def _continue(
    config: Config,
    processes: Processes,
    run: RunFolder,
    make: Callable[[RunFolder, int], Session],
    *,
    checkpoint: str | None,
) -> Path:
    """Trains on from a checkpoint, or from the start where there is none yet."""
    with held(run, processes):
        nothing = checkpoint is None and latest_checkpoint(run.path) is None
        source = None if nothing else checkpoint_to_resume(run, checkpoint)
        check_epochs(config, source)
        session = make(run, 0 if source is None else checkpoint_epoch(source) + 1)
        with closing(session.tracker):
            restore(session, source)
            return _train(session)


# ---- the loop --------------------------------------------------------------------------------------------------------


def _train(session: Session) -> Path:
    """Runs epochs until the configured number or time is reached; returns the run folder.

    Raises:
        RunStopped: On a signal, once the last whole epoch is in a checkpoint.
    """
    state = session.state
    with session.processes.signals.caught():
        threads = max(1, len(state.config.reward_processes.devices))
        with Scorer(state.reward, group_size=session.plan.group_size, threads=threads) as scorer:
            try:
                stopped = _epochs(session, scorer)
            except (RewardError, Interrupted) as stop:
                if state.saved_epoch != state.epoch:
                    _checkpoint(session)
                if isinstance(stop, RewardError):
                    raise
                raise RunStopped(_farewell(session, stop)) from None
        finish(session, stopped=stopped)
    return session.run.path


def _epochs(session: Session, scorer: Scorer) -> bool:
    """Runs the epochs that are left; returns whether over-optimisation ended them early."""
    state, config, processes = session.state, session.state.config, session.processes
    objective = policy_gradient(config.objective)
    out_of_time = _is_out_of_time(session)
    if lacks_evaluation(session, last=out_of_time or state.epoch >= config.epochs):
        evaluate(session)
        if state.saved_epoch == state.epoch:
            _checkpoint(session)  # what the evaluation has found belongs to it
    stopped = is_overoptimised(session)
    if out_of_time:
        session.progress.line(f"max_minutes ({config.max_minutes:g}) are used up: no epoch is trained")
    with session.progress.epochs(state.epoch, config.epochs, timed=config.max_minutes is not None) as bar:
        for _ in bar:
            if out_of_time or stopped:
                break
            processes.safe_point("the pause between epochs")
            clock = Stopwatch(state.policy.device)
            started = time.perf_counter()
            with _all_or_nothing(state):
                collected = collect(state, session.plan, processes, scorer, session.progress, clock)
                with clock("train"):
                    report = update(state, objective, collected.experience, session.plan, processes, session.progress)
            state.epoch += 1
            state.samples += session.plan.images_per_epoch
            state.seconds += time.perf_counter() - started
            _log(session, collected, report, clock)
            state.alpha = next_alpha(config.kl, state.alpha, collected.path_kl)
            state.multipliers.update(collected.constraints.means)
            state.reward.epoch = state.epoch
            out_of_time = _is_out_of_time(session)
            last = out_of_time or state.epoch == config.epochs
            if last or due(state.epoch, config.evaluation.every_epochs):
                evaluate(session)
                stopped = is_overoptimised(session)
            last = last or stopped
            if last or due(state.epoch, config.checkpoints.every_epochs):
                _checkpoint(session)
    return stopped


def _is_out_of_time(session: Session) -> bool:
    limit, minutes = session.state.config.max_minutes, session.state.seconds / 60
    return limit is not None and session.processes.agreed(minutes >= limit)


@contextmanager
def _all_or_nothing(state: TrainState) -> Iterator[None]:
    """Undoes what a failing reward or a signal leaves of an epoch, unless its start is in a checkpoint already."""
    snapshot = None if state.saved_epoch == state.epoch else state.snapshot()
    try:
        yield
    except (RewardError, Interrupted):
        if snapshot is not None:
            state.restore(snapshot)
        raise


def _farewell(session: Session, stop: Interrupted) -> str:
    """What a signal has cost, and how to go on."""
    done = session.state.epoch
    partial = f"epoch {done + 1} is dropped and will be repeated" if stop.phase in IN_EPOCH else "no epoch is lost"
    return (
        f"stopped by {stop.signal} during {stop.phase}: {partial}; {done} whole epochs are in "
        f"{checkpoint_path(session.run.path, done)}\ncontinue with: ddpo train --resume {session.run.path}"
    )


def _log(session: Session, collected: Collected, report: UpdateReport, clock: Stopwatch) -> None:
    """Writes an epoch's metrics and pictures; on the main process only."""
    if not session.processes.is_main:
        return
    state = session.state
    row = epoch_row(state, collected, report, clock)
    session.run.append_metrics(row)
    session.progress.line(epoch_line(row))
    session.tracker.log(scalars(row), step=state.epoch)
    session.tracker.histogram("reward/histogram", collected.scores.total.tolist(), step=state.epoch)
    if due(state.epoch, state.config.tracking.pictures_every_epochs):
        condition = collected.experience.trajectory.condition
        captions = [caption(condition.prompts[i], float(collected.experience.scores[i])) for i in collected.shown]
        inputs = shown_inputs([condition.metadata[i] for i in collected.shown], collected.images)
        drawn = with_inputs(collected.images, inputs)
        session.run.save_picture(grid(drawn, captions), f"epoch_{state.epoch:06d}")
        pictures = [Picture(image=x, caption=text) for x, text in zip(drawn, captions, strict=True)]
        session.tracker.images("samples", pictures, step=state.epoch)


def _checkpoint(session: Session) -> None:
    state = session.state
    state.save(checkpoint_path(session.run.path, state.epoch), session.processes)
    if session.processes.is_main:
        prune(session.run.path, state.config.checkpoints.keep_last)
