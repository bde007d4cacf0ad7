"""The training loop: sample, score, update, log, evaluate, checkpoint.

    prompts -> sample -> score -> credit -> update, each a verb of its own in trainers.epoch

`train` is the Python API; the command line comes in through `train_from_config` and `resume`.
"""

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from ddpo import Policy
from ddpo.validation import UserError
from rewards import RewardError, RewardTerm, WeightedSum, as_reward, resolve
from trainers.config import Config
from trainers.config.io import load_config, to_yaml
from trainers.config.locations import absolute
from trainers.epoch.binding import Collected, Source, critic_of, online, updater
from trainers.epoch.critic import FitReport, ValueLearner
from trainers.epoch.offline import offline
from trainers.epoch.regularization import make_regularizer
from trainers.epoch.report import epoch_line, epoch_row, scalars, shown_inputs
from trainers.epoch.update import UpdateReport
from trainers.evaluating import due, evaluate, evaluate_start, is_overoptimised, lacks_evaluation
from trainers.exports import finish
from trainers.offline.read import load_judged
from trainers.parallel.agreement import check_same_config, on_main
from trainers.parallel.interruption import Interrupted, RunStopped
from trainers.parallel.processes import Processes
from trainers.planning.plan import BatchPlan, expected_plan
from trainers.planning.policy_loading import configure
from trainers.planning.preflight import check_heldout
from trainers.prompts import Prompt, load_prompts
from trainers.run_folder.checkpoint import checkpoint_epoch, checkpoint_path, prune
from trainers.run_folder.epochs import epoch_name
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.husks import has_finished, remove
from trainers.run_folder.lock import held
from trainers.run_folder.lost_peer import peers_needed
from trainers.run_folder.mending import mend
from trainers.run_folder.model_record import pinned
from trainers.run_folder.python_runs import as_saved, objects_of, read_prompts, with_policy
from trainers.run_folder.records import copy_records
from trainers.run_folder.resume import Resume
from trainers.scoring.loading import load_heldout, load_total
from trainers.scoring.scorer import scoring_threads
from trainers.session import Loaded, Session, create_run, make_session, prepare, restore
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.pictures import caption, grid, spread, with_inputs
from trainers.tracking.terminal import keep_output_in
from trainers.tracking.tracker import Picture

RewardLike = str | Callable[..., object]
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
IN_EPOCH = ("sampling", "rewards", "training")


def train(
    policy: Policy,
    *,
    reward: RewardLike | Sequence[RewardLike] | WeightedSum | None = None,
    prompts: Sequence[str] | Sequence[Prompt] | None = None,
    config: Config | None = None,
    heldout: WeightedSum | None = None,
    resume: Path | None = None,
    accept: Collection[str] = (),
) -> Path:
    """Fine-tunes a policy.

    Args:
        policy: From `Policy.from_pretrained`; its sampler, adapter, precision and source go into the configuration.
        reward: A registered name, `file.py:name`, a function `(images, prompts, metadata) -> (B,)`, a list of these,
            summed, or a `WeightedSum` with weights; takes the place of the configuration's. Default `config.rewards`;
            with `config.offline` there may be none.
        prompts: Training prompts, texts or dictionaries as in a file; also the evaluation's, unless
            `config.evaluation.prompts` says otherwise. Default `config.prompts`. With `config.offline` only the
            evaluation's.
        config: Everything else; default `Config()`, on resume the run's own. Its groups are in `trainers.config`;
            `trainers.config.io.config_of` makes one of nested dictionaries.
        heldout: Rewards that are measured and not optimised; default `config.heldout_rewards`.
        resume: Continue this run folder from its newest checkpoint instead of starting a new one.
        accept: On resume, what may be another one than the run began with (`model`), or damaged (`evaluations`).

    Returns:
        The run folder.

    Raises:
        ConfigError: The configuration contradicts the policy, or on resume the run's own.
        RunStopped: On SIGTERM, SIGUSR1 or Ctrl-C, once the last whole epoch is in a checkpoint.
    """
    folder = None if resume is None else RunFolder.open(resume)
    saved = None if folder is None else load_config(folder.config_file)
    config, loaded = _from_objects(config or saved or Config(), policy, reward, prompts, heldout, saved=saved)
    processes = Processes(device=policy.device.type)
    check_same_config(config, processes, resume=resume)
    if folder is not None and saved is not None:
        resumed = Resume(folder=folder, saved=saved, config=as_saved(config, saved, folder), accept=accept)
        return _continue(resumed, processes, loaded)
    plan = expected_plan(config, num_processes=processes.count)
    folder = create_run(config, processes, yaml=to_yaml(config, full=True))
    return _begin(config, processes, folder, loaded, plan=plan)


def _from_objects(
    config: Config,
    policy: Policy,
    reward: RewardLike | Sequence[RewardLike] | WeightedSum | None,
    prompts: Sequence[str] | Sequence[Prompt] | None,
    heldout: WeightedSum | None,
    *,
    saved: Config | None,
) -> tuple[Config, Loaded]:
    """What is handed to `train`, completed from the configuration; and the configuration that says what it is."""
    config = absolute(with_policy(config, policy, moved=saved is not None))
    if config.reward_processes.devices:
        raise UserError("reward_processes needs rewards by name, from a configuration; train() computes them itself")
    config, texts = read_prompts(config, prompts)
    evaluated = texts if config.evaluation.prompts is None else load_prompts(config.evaluation.prompts)
    if reward is None and not config.terms and config.offline is None:
        raise UserError("train() needs reward= or config.rewards, but for config.offline: images judged already")
    total = load_total(config, str(policy.device)) if reward is None else _as_sum(reward, policy.device)
    heldout = heldout or load_heldout(config, str(policy.device))
    config = replace(config, rewards=total.terms, heldout_rewards=() if heldout is None else heldout.terms)
    if config.terms != config.rewards:
        missing = ", ".join(term.name for term in config.terms[len(config.rewards) :])
        raise UserError(f"constraints name {missing}, which the reward lacks; add it to the WeightedSum with weight 0")
    check_heldout(config)
    configure(policy, config)
    return config, Loaded(
        policy=policy,
        reward=total,
        heldout=heldout,
        prompts=texts if config.offline is None else load_judged(config.offline),
        evaluation_prompts=evaluated,
        objects=objects_of(config, policy, total, heldout),
    )


def _as_sum(reward: RewardLike | Sequence[RewardLike] | WeightedSum, device: torch.device) -> WeightedSum:
    """Rewards by name or function, one or several, as a sum."""
    if isinstance(reward, WeightedSum):
        return reward
    parts = [reward] if isinstance(reward, str) or callable(reward) else list(reward)
    if all(isinstance(part, str) for part in parts):
        return WeightedSum([RewardTerm(name=str(part)) for part in parts], device=device)
    made = [resolve(part, device=device) if isinstance(part, str) else as_reward(part) for part in parts]
    return WeightedSum.of(*made)


def train_from_config(
    config: Config, *, config_yaml: str, stem: str | None = None, plan: BatchPlan | None = None
) -> Path:
    """Starts a run from a configuration that passed `trainers.planning.preflight`.

    Args:
        config: The configuration.
        config_yaml: Its text, saved with the run.
        stem: Name of its file without the suffix, after which a run without `run.name` is called.
        plan: What the preflight has planned and shown; the plan is shown again if the pipeline makes it another one.

    Returns:
        The run folder.
    """
    processes = Processes(device=config.model.device)
    check_same_config(config, processes, resume=None)
    run = create_run(config, processes, yaml=config_yaml, stem=stem)
    return _begin(config, processes, run, plan=plan)


def resume(
    run: Path, overrides: Sequence[str] = (), *, checkpoint: str | None = None, accept: Collection[str] = ()
) -> Path:
    """Continues a run exactly where a checkpoint left it.

    Args:
        run: The run folder.
        overrides: `--key value` tokens for keys that may change (epochs, max_minutes, optimizer.schedule_epochs,
            checkpoints.*, tracking.*, distributed.*, reward_processes.*); the run folder keeps them for the next
            resume.
        checkpoint: Name of the checkpoint folder; None takes the newest.
        accept: What may be another one than the run began with (`model`), or damaged (`evaluations`).

    Returns:
        The run folder.

    A run that was killed before its first checkpoint starts again in its folder.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged; the message names one to use instead.
        ConfigError: The configuration ends before the checkpoint, or another key changes.
        RunError: Another process trains this run, it was started from Python with objects of its own, its pretrained
            model is another one, or a file that it needs is damaged.
        RunStopped: On a signal, once the last whole epoch is in a checkpoint.
    """
    return continue_run(Resume.read(run, overrides, checkpoint=checkpoint, accept=accept))


def continue_run(resumed: Resume, *, plan: BatchPlan | None = None) -> Path:
    """Continues a run that was read already, as `resume` does.

    Args:
        resumed: The run.
        plan: What the preflight has planned and shown; None for nothing.
    """
    processes = Processes(device=resumed.config.model.device)
    check_same_config(resumed.config, processes, resume=resumed.folder.path, checkpoint=resumed.checkpoint)
    return _continue(resumed, processes, plan=plan)


def _begin(
    config: Config,
    processes: Processes,
    run: RunFolder,
    loaded: Loaded | None = None,
    *,
    plan: BatchPlan | None,
) -> Path:
    """Trains from the start what is loaded, or what the configuration names.

    What the user has to mend before the first epoch is finished leaves no folder behind; what a signal or a lost
    process stops does.
    """
    keep_output_in(run.path)
    with peers_needed(run.path), held(run, processes):
        is_made = False
        try:
            session = make_session(config, loaded or prepare(config, processes), processes, run, planned=plan)
            is_made = True
            with closing(session.tracker):
                return _train(session)
        except BaseException as error:
            is_useless = not is_made or isinstance(error, (UserError, RewardError, torch.OutOfMemoryError))
            if processes.is_main and is_useless and not has_finished(run):
                remove(run)
            raise


def _continue(
    resumed: Resume, processes: Processes, loaded: Loaded | None = None, *, plan: BatchPlan | None = None
) -> Path:
    """Trains on from a checkpoint, or from the start where there is none yet."""
    keep_output_in(resumed.folder.path)
    with peers_needed(resumed.folder.path), held(resumed.folder, processes):
        source, config = resumed.source(), resumed.config
        done = None if source is None else checkpoint_epoch(source)
        notices = on_main(lambda: mend(resumed.folder, done=done, accept=resumed.accept), processes) or []
        loaded = loaded or prepare(pinned(config, resumed.folder.path), processes)
        session = make_session(
            config, loaded, processes, resumed.folder, source=source, planned=plan, accept=resumed.accept
        )
        with closing(session.tracker):
            for notice in notices:
                session.progress.line(notice)
            restore(session, source, saved=resumed.saved)
            return _train(session)


# ---- the loop --------------------------------------------------------------------------------------------------------


def _train(session: Session) -> Path:
    """Runs epochs until the configured number or time is reached; returns the run folder.

    Raises:
        RunStopped: On a signal, once the last whole epoch is in a checkpoint.
    """
    state = session.state
    with session.processes.signals.caught():
        count = max(1, len(state.config.reward_processes.devices))
        with scoring_threads(count) as threads:
            try:
                stopped = _epochs(session, threads)
            except (RewardError, Interrupted) as stop:
                if state.saved_epoch != state.epoch:
                    _checkpoint(session)
                if isinstance(stop, RewardError):
                    raise
                raise RunStopped(_farewell(session, stop)) from None
        finish(session, stopped=stopped)
    return session.run.path


def _epochs(session: Session, threads: ThreadPoolExecutor) -> bool:
    """Runs the epochs that are left; returns whether over-optimisation ended them early."""
    state, config, processes = session.state, session.state.config, session.processes
    values, seconds = critic_of(state, session.plan, processes=processes), CLOCKS[config.clock]
    source = _source(session, threads, values)
    regularizer = make_regularizer(state, session.run.path, processes=processes, progress=session.progress)
    update = updater(state, session.plan, processes=processes, progress=session.progress, regularizer=regularizer)
    out_of_time = _is_out_of_time(session)
    evaluate_start(session)
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
            started = seconds()
            with state.undone_on(RewardError, Interrupted):
                collected = source(state.epoch, clock)
                with state.weights_undone_on(Interrupted):
                    with clock("train"):
                        report = update(collected.experience, epoch=state.epoch)
                    fitted = _fit(values, collected, clock, epoch=state.epoch)
            state.counts.epoch += 1
            state.counts.samples += session.plan.images_per_epoch
            state.counts.seconds += seconds() - started
            out_of_time = _is_out_of_time(session)
            last = out_of_time or state.epoch == config.epochs
            _log(session, collected, report, clock, fitted=fitted, last=last)
            session.progress.note_time(bar, state.counts.seconds / 60, config.max_minutes, epochs=state.epoch)
            if collected.kl is not None:
                state.follow_kl(collected.kl.held)
            if collected.credit is not None:
                state.multipliers.update(collected.credit.constraints.means)
            if last or due(state.epoch, config.evaluation.every_epochs):
                evaluate(session)
                stopped = is_overoptimised(session)
            last = last or stopped
            if last or due(state.epoch, config.checkpoints.every_epochs):
                _checkpoint(session)
    return stopped


def _fit(values: ValueLearner | None, collected: Collected, clock: Stopwatch, *, epoch: int) -> FitReport | None:
    """Fits the critic, where there is one, to what an epoch's samples earned."""
    outcome = None if collected.credit is None else collected.credit.outcome
    if values is None or outcome is None:
        return None
    with clock("critic"):
        return values.fit(collected.samples, outcome, start=collected.experience.start, epoch=epoch)


def _source(session: Session, threads: ThreadPoolExecutor, values: ValueLearner | None) -> Source:
    """Where an epoch's data come from: the policy's own samples, or images that were judged already."""
    state, processes, progress = session.state, session.processes, session.progress
    if (judged := state.config.offline) is None:
        return online(state, session.plan, threads=threads, processes=processes, progress=progress, values=values)
    return offline(state, session.plan, judged=judged, processes=processes, progress=progress)


def _is_out_of_time(session: Session) -> bool:
    limit, minutes = session.state.config.max_minutes, session.state.counts.seconds / 60
    return limit is not None and session.processes.agreed(minutes >= limit)


def _farewell(session: Session, stop: Interrupted) -> str:
    """What a signal has cost, and how to go on."""
    done = session.state.epoch
    partial = f"epoch {done + 1} is dropped and will be repeated" if stop.phase in IN_EPOCH else "no epoch is lost"
    return (
        f"stopped by {stop.signal} during {stop.phase}: {partial}; {done} whole epochs are in "
        f"{checkpoint_path(session.run.path, done)}\ncontinue with: ddpo train --resume {session.run.path}"
    )


def _log(
    session: Session,
    collected: Collected,
    report: UpdateReport,
    clock: Stopwatch,
    *,
    fitted: FitReport | None,
    last: bool,
) -> None:
    """Writes an epoch's metrics and pictures, of the last one in any case; on the main process only."""
    if not session.processes.is_main:
        return
    state = session.state
    row = epoch_row(state, collected, report, clock, fitted=fitted)
    session.run.append_metrics(row)
    session.progress.line(epoch_line(row))
    for finding in session.watch.look(row):
        session.progress.line(f"WARNING: {finding.sentence} (ddpo doctor {session.run.path})")
    session.tracker.log(scalars(row), step=state.epoch)
    if collected.scores is not None:
        session.tracker.histogram("reward/histogram", collected.scores.total.tolist(), step=state.epoch)
    every = state.config.tracking.pictures_every_epochs
    if due(state.epoch, every) or (last and every > 0):
        _show(session, collected)


def _show(session: Session, collected: Collected) -> None:
    """Draws some of this process's samples, evenly over them."""
    state, samples, experience = session.state, collected.samples, collected.experience
    name, totals = ("label", experience.scores) if collected.scores is None else ("reward", collected.scores.total)
    totals = totals[experience.start :]
    shown = spread(len(samples), state.config.tracking.num_pictures)
    captions = [caption(samples.prompts[i], float(totals[i]), name=name) for i in shown]
    latents = samples.trajectory.final[shown].to(state.policy.device).split(state.config.batch.sample_batch_size)
    images = torch.cat([state.policy.decode(part).cpu() for part in latents])
    drawn = with_inputs(images, shown_inputs([samples.metadata[i] for i in shown], images))
    session.run.save_picture(grid(drawn, captions), epoch_name(state.epoch))
    pictures = [Picture(image=x, caption=text) for x, text in zip(drawn, captions, strict=True)]
    session.tracker.images("samples", pictures, step=state.epoch)


def _checkpoint(session: Session) -> None:
    state = session.state
    run = session.run.path
    state.save(checkpoint_path(run, state.epoch), session.processes, beside=lambda path: copy_records(run, path))
    if session.processes.is_main:
        session.run.note_checkpoint(epoch_name(state.epoch))
        prune(run, state.config.checkpoints.keep_last)
