"""The training loop: sample, score, update, log, evaluate, checkpoint.

    prompts -> rollout -> decode -> rewards -> advantages     trainers.collection
            -> objective -> backward -> optimizer             trainers.update

`train` is the Python API; the command line comes in through `train_from_config` and `resume`.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ddpo import Policy
from ddpo.kl import next_alpha
from ddpo.objectives import policy_gradient
from rewards import RewardError, RewardTerm, WeightedSum, as_reward
from trainers.checkpoint import (
    checkpoint_epoch,
    checkpoint_path,
    latest_checkpoint,
    prune,
)
from trainers.collection import Collected, collect
from trainers.config import Config
from trainers.config_io import load_resumed, to_yaml
from trainers.evaluation import Evaluation
from trainers.interruption import Interrupted, RunStopped
from trainers.metrics import Stopwatch
from trainers.model_card import write_model_card
from trainers.overoptimisation import best_weights
from trainers.pictures import caption, grid, save_curves, to_pil, with_inputs
from trainers.processes import Processes
from trainers.prompts import Prompt, load_prompts
from trainers.report import BEFORE_AFTER, epoch_line, epoch_row, scalars, shown_inputs, spread, write_comparison
from trainers.review import due, evaluate, is_overoptimised, lacks_evaluation
from trainers.run import RunFolder, read_metrics
from trainers.scoring import Scorer
from trainers.session import Session, checkpoint_to_resume, create_run, load_session, make_session, restore
from trainers.state import TrainState
from trainers.tracking import Picture
from trainers.update import UpdateReport, update

IN_EPOCH = ("sampling", "rewards", "training")
CURVES = ("reward/mean", "kl/path_nats", "policy/clip_fraction", "optimizer/grad_norm", "policy/gate_nats", "kl/alpha")


def train(
    policy: Policy,
    *,
    reward: str | Callable[..., object] | WeightedSum,
    prompts: Sequence[str] | Sequence[Prompt],
    config: Config | None = None,
    heldout: WeightedSum | None = None,
    resume: Path | None = None,
) -> Path:
    """Fine-tunes a policy.

    Args:
        policy: From `Policy.from_pretrained`; its sampler takes the place of the configuration's.
        reward: A registered name, `file.py:name`, a function `(images, prompts, metadata) -> (B,)`, or several as a
            `WeightedSum`.
        prompts: Training prompts; also the evaluation's, unless `config.evaluation.prompts` says otherwise.
        config: Everything else; default `Config()`.
        heldout: Rewards that are measured and not optimised.
        resume: Continue this run folder from its newest checkpoint instead of starting a new one.

    Returns:
        The run folder.

    Raises:
        RunStopped: On SIGTERM, SIGUSR1 or Ctrl-C, once the last whole epoch is in a checkpoint.
    """
    config = replace(config or Config(), sampler=policy.sampler)
    if config.reward_processes.devices:
        raise ValueError("reward_processes needs rewards by name, from a configuration; train() computes them itself")
    texts = [prompt if isinstance(prompt, Prompt) else Prompt(text=prompt) for prompt in prompts]
    if isinstance(reward, str):
        reward = WeightedSum([RewardTerm(name=reward)], device=policy.device)
    total = reward if isinstance(reward, WeightedSum) else WeightedSum.of(as_reward(reward))
    config = replace(config, rewards=total.terms)
    if config.terms != config.rewards:
        missing = ", ".join(term.name for term in config.terms[len(config.rewards) :])
        raise ValueError(f"constraints name {missing}, which the reward lacks; add it to the WeightedSum with weight 0")
    evaluated = texts if config.evaluation.prompts is None else load_prompts(config.evaluation.prompts)
    processes = Processes(device=policy.device.type)
    if resume is None:
        run = create_run(config, processes, yaml=to_yaml(config, full=True))
        session = make_session(config, policy, total, heldout, texts, evaluated, processes, run, first_step=0)
    else:
        run = RunFolder.open(resume)
        source = checkpoint_to_resume(run, None)
        first_step = checkpoint_epoch(source) + 1
        session = make_session(config, policy, total, heldout, texts, evaluated, processes, run, first_step=first_step)
        restore(session, source)
    return _train(session)


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
    return _train(load_session(config, processes, run, first_step=0))


def resume(run: Path, overrides: Sequence[str] = (), *, checkpoint: str | None = None) -> Path:
    """Continues a run exactly where a checkpoint left it.

    Args:
        run: The run folder.
        overrides: `--key value` tokens for keys that may change (epochs, max_minutes, checkpoints.*, tracking.*,
            reward_processes.*).
        checkpoint: Name of the checkpoint folder; None takes the newest.

    Returns:
        The run folder.

    A run that was killed before its first checkpoint starts again in its folder.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged; the message names one to use instead.
        RunStopped: On a signal, once the last whole epoch is in a checkpoint.
    """
    folder = RunFolder.open(run)
    config = load_resumed(folder.path / "config.yaml", overrides)
    nothing = checkpoint is None and latest_checkpoint(folder.path) is None
    source = None if nothing else checkpoint_to_resume(folder, checkpoint)
    processes = Processes(device=config.model.device)
    session = load_session(config, processes, folder, first_step=0 if source is None else checkpoint_epoch(source) + 1)
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
        _finish(session, stopped=stopped)
    return session.run.path


def _epochs(session: Session, scorer: Scorer) -> bool:
    """Runs the epochs that are left; returns whether over-optimisation ended them early."""
    state, config, processes = session.state, session.state.config, session.processes
    objective = policy_gradient(config.objective)
    if lacks_evaluation(session):
        evaluate(session)
    out_of_time = stopped = False
    with session.progress.epochs(state.epoch, config.epochs) as bar:
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
            minutes = state.seconds / 60
            out_of_time = config.max_minutes is not None and processes.agreed(minutes >= config.max_minutes)
            last = out_of_time or state.epoch == config.epochs
            if last or due(state.epoch, config.evaluation.every_epochs):
                evaluate(session)
                stopped = is_overoptimised(session)
            last = last or stopped
            if last or due(state.epoch, config.checkpoints.every_epochs):
                _checkpoint(session)
    return stopped


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
        scores = collected.experience.scores.tolist()
        captions = [caption(p, s) for p, s in zip(collected.prompts, scores[: len(collected.images)], strict=False)]
        condition = collected.experience.trajectory.condition
        drawn = with_inputs(collected.images, shown_inputs(condition.metadata, collected.images))
        session.run.save_picture(grid(drawn, captions), f"epoch_{state.epoch:06d}")
        pictures = [Picture(image=x, caption=text) for x, text in zip(drawn, captions, strict=True)]
        session.tracker.images("samples", pictures, step=state.epoch)


def _checkpoint(session: Session) -> None:
    state = session.state
    state.save(checkpoint_path(session.run.path, state.epoch), session.processes)
    if session.processes.is_main:
        prune(session.run.path, state.config.checkpoints.keep_last)


def _finish(session: Session, *, stopped: bool) -> None:
    """Exports the weights and ends the run with the comparison of its first evaluation and that of these weights."""
    state, run = session.state, session.run
    evaluations, best = run.evaluations, best_weights(run.path) if stopped else None
    if best is None:
        state.export(run.lora, session.processes)
    if not session.processes.is_main:
        return
    if best is not None:
        shutil.copytree(best, run.lora, dirs_exist_ok=True)
        session.progress.line(f"the weights of the best evaluation ({best.name}) are exported, not the last ones")
    chosen = f"epoch_{state.epoch:06d}" if best is None else best.name
    texts = session.evaluator.texts
    before = Evaluation.load(evaluations, "epoch_000000", texts).rescored(state.reward)
    after = Evaluation.load(evaluations, chosen, texts).rescored(state.reward)
    shown = state.config.tracking.num_pictures
    table = write_comparison(run.path, before, after, num_pictures=shown, metadata=session.evaluator.metadata)
    shutil.copy(run.path / BEFORE_AFTER, run.lora / BEFORE_AFTER)
    epoch = int(chosen.removeprefix("epoch_"))
    samples = epoch * state.config.batch.samples_per_epoch
    write_model_card(
        run.lora, state.policy, state.config, epoch=epoch, samples=samples, results=table, picture=BEFORE_AFTER
    )
    save_curves(read_metrics(run.path), CURVES, run.path / "curves.png")
    pictures = [Picture(image=to_pil(after.pictures()[i]), caption=texts[i]) for i in spread(len(texts), shown)]
    session.tracker.images("final", pictures, step=state.epoch)
    session.tracker.close()
    print(f"\n{table}\n\npicture: {run.path / BEFORE_AFTER}\nweights: {run.lora}", flush=True)  # noqa: T201
