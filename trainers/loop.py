"""The training loop: sample, score, update, log, evaluate, checkpoint.

    prompts -> rollout -> decode -> rewards -> advantages     trainers.collection
            -> objective -> backward -> optimizer             trainers.update

`train` is the Python API; the command line comes in through `train_from_config` and `resume`.
"""

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
from trainers.pictures import caption, grid, save_curves, to_pil
from trainers.processes import Processes
from trainers.prompts import Prompt, load_prompts
from trainers.report import epoch_line, epoch_row, scalars, spread, write_comparison
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
    texts = [prompt if isinstance(prompt, Prompt) else Prompt(text=prompt) for prompt in prompts]
    if isinstance(reward, str):
        reward = WeightedSum([RewardTerm(name=reward)], device=policy.device)
    total = reward if isinstance(reward, WeightedSum) else WeightedSum.of(as_reward(reward))
    config = replace(config, rewards=total.terms)
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


def train_from_config(config: Config, *, config_yaml: str) -> Path:
    """Starts a run from a configuration that passed `trainers.preflight`.

    Args:
        config: The configuration.
        config_yaml: Its text, saved with the run.

    Returns:
        The run folder.
    """
    processes = Processes(device=config.model.device)
    run = create_run(config, processes, yaml=config_yaml)
    return _train(load_session(config, processes, run, first_step=0))


def resume(run: Path, overrides: Sequence[str] = (), *, checkpoint: str | None = None) -> Path:
    """Continues a run exactly where a checkpoint left it.

    Args:
        run: The run folder.
        overrides: `--key value` tokens for keys that may change (epochs, max_minutes, checkpoints.*, tracking.*).
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
        with Scorer(state.reward) as scorer:
            try:
                _epochs(session, scorer)
            except (RewardError, Interrupted) as stop:
                if state.saved_epoch != state.epoch:
                    _checkpoint(session)
                if isinstance(stop, RewardError):
                    raise
                raise RunStopped(_farewell(session, stop)) from None
        _finish(session)
    return session.run.path


def _epochs(session: Session, scorer: Scorer) -> None:
    state, config, processes = session.state, session.state.config, session.processes
    objective = policy_gradient(config.objective)
    if _lacks_evaluation(session):
        _evaluate(session)
    out_of_time = False
    with session.progress.epochs(state.epoch, config.epochs) as bar:
        for _ in bar:
            if out_of_time:
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
            minutes = state.seconds / 60
            out_of_time = config.max_minutes is not None and _agreed(processes, minutes >= config.max_minutes)
            last = out_of_time or state.epoch == config.epochs
            if last or _due(state.epoch, config.evaluation.every_epochs):
                _evaluate(session)
            if last or _due(state.epoch, config.checkpoints.every_epochs):
                _checkpoint(session)


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
    if _due(state.epoch, state.config.tracking.pictures_every_epochs):
        scores = collected.experience.scores.tolist()
        captions = [caption(p, s) for p, s in zip(collected.prompts, scores[: len(collected.images)], strict=False)]
        session.run.save_picture(grid(collected.images, captions), f"epoch_{state.epoch:06d}")
        pictures = [Picture(image=to_pil(x), caption=text) for x, text in zip(collected.images, captions, strict=True)]
        session.tracker.images("samples", pictures, step=state.epoch)


def _lacks_evaluation(session: Session) -> bool:
    """Whether the finished epochs end with an evaluation that there is not: at the start, or stopped by a signal."""
    state, config = session.state, session.state.config
    wanted = state.epoch in (0, config.epochs) or _due(state.epoch, config.evaluation.every_epochs)
    exists = (session.run.evaluations / f"epoch_{state.epoch:06d}.safetensors").is_file()
    return wanted and not _agreed(session.processes, exists)


def _evaluate(session: Session) -> None:
    """Evaluates the (averaged) weights, logs and saves the result."""
    state = session.state
    with state.ema.applied():
        result = session.evaluator(state.policy, state.reward, session.heldout)
    if session.processes.is_main:
        summary = result.summary()
        result.save(session.run.evaluations, f"epoch_{state.epoch:06d}")
        session.tracker.log({f"eval/{name}": measure.mean for name, measure in summary.items()}, step=state.epoch)
        text = "  ".join(f"{name} {measure}" for name, measure in summary.items() if not name.startswith("ode/"))
        session.progress.line(f"evaluation at epoch {state.epoch}: {text}")


def _checkpoint(session: Session) -> None:
    state = session.state
    state.save(checkpoint_path(session.run.path, state.epoch), session.processes)
    if session.processes.is_main:
        prune(session.run.path, state.config.checkpoints.keep_last)


def _finish(session: Session) -> None:
    """Exports the weights and ends the run with the comparison of its first and its last evaluation."""
    state, run, evaluations = session.state, session.run, session.run.evaluations
    state.export(run.lora, session.processes)
    if not session.processes.is_main:
        return
    texts = session.evaluator.texts
    before = Evaluation.load(evaluations, "epoch_000000", texts).rescored(state.reward)
    after = Evaluation.load(evaluations, f"epoch_{state.epoch:06d}", texts).rescored(state.reward)
    table = write_comparison(run.path, before, after, num_pictures=state.config.tracking.num_pictures)
    save_curves(read_metrics(run.path), CURVES, run.path / "curves.png")
    shown = spread(len(texts), state.config.tracking.num_pictures)
    pictures = [Picture(image=to_pil(after.pictures()[i]), caption=texts[i]) for i in shown]
    session.tracker.images("final", pictures, step=state.epoch)
    session.tracker.close()
    print(f"\n{table}\n\npicture: {run.path / 'before_after.png'}\nweights: {run.lora}", flush=True)  # noqa: T201


def _due(epoch: int, every: int) -> bool:
    return every > 0 and epoch % every == 0


def _agreed(processes: Processes, value: bool) -> bool:
    """The main process's answer, so that all stop at the same epoch."""
    return bool(processes.gather_json(value)[0])
