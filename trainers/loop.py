"""The training loop: sample, score, update, log, evaluate, checkpoint.

    prompts -> rollout -> decode -> rewards -> advantages     trainers.collection
            -> objective -> backward -> optimizer             trainers.update

`train` is the Python API; the command line comes in through `train_from_config` and `resume`.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ddpo import Policy
from ddpo.kl import next_alpha
from ddpo.objectives import policy_gradient
from rewards import RewardError, RewardTerm, WeightedSum, as_reward
from trainers.checkpoint import (
    checkpoint_epoch,
    checkpoint_path,
    prune,
)
from trainers.collection import Collected, collect
from trainers.config import Config
from trainers.config_io import load_resumed, to_yaml
from trainers.evaluation import Evaluation
from trainers.metrics import Stopwatch
from trainers.overoptimisation import Finding, best_weights, find, heldout_signs, keep_best, read_history, save_record
from trainers.pictures import caption, grid, save_curves, to_pil
from trainers.processes import Processes
from trainers.prompts import Prompt, load_prompts
from trainers.report import epoch_line, epoch_row, scalars, spread, write_comparison
from trainers.run import RunFolder, read_metrics
from trainers.scoring import Scorer
from trainers.session import Session, checkpoint_to_resume, create_run, load_session, make_session, restore
from trainers.tracking import Picture
from trainers.update import UpdateReport, update

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
    """
    config = replace(config or Config(), sampler=policy.sampler)
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

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged; the message names one to use instead.
    """
    folder = RunFolder.open(run)
    config = load_resumed(folder.path / "config.yaml", overrides)
    source = checkpoint_to_resume(folder, checkpoint)
    processes = Processes(device=config.model.device)
    session = load_session(config, processes, folder, first_step=checkpoint_epoch(source) + 1)
    restore(session, source)
    return _train(session)


# ---- the loop --------------------------------------------------------------------------------------------------------


def _train(session: Session) -> Path:
    """Runs epochs until the configured number or time is reached; returns the run folder."""
    state, config = session.state, session.state.config
    objective = policy_gradient(config.objective)
    evaluations = session.run.path / "evaluations"
    if state.epoch == 0:
        _evaluate(session, evaluations)
    out_of_time = stopped = False
    with (
        Scorer(state.reward, group_size=session.plan.group_size) as scorer,
        session.progress.epochs(state.epoch, config.epochs) as bar,
    ):
        for _ in bar:
            if out_of_time or stopped:
                break
            clock = Stopwatch(state.policy.device)
            started, position = time.perf_counter(), state.prompts.position
            try:
                collected = collect(state, session.plan, session.processes, scorer, session.progress, clock)
            except RewardError:
                state.prompts.position = position
                _checkpoint(session)
                raise
            with clock("train"):
                report = update(
                    state, objective, collected.experience, session.plan, session.processes, session.progress
                )
            state.epoch += 1
            state.samples += session.plan.images_per_epoch
            state.seconds += time.perf_counter() - started
            _log(session, collected, report, clock)
            state.alpha = next_alpha(config.kl, state.alpha, collected.path_kl)
            state.multipliers.update(collected.constraints.means)
            state.reward.epoch = state.epoch
            minutes = state.seconds / 60
            out_of_time = config.max_minutes is not None and _agreed(session.processes, minutes >= config.max_minutes)
            last = out_of_time or state.epoch == config.epochs
            if last or _due(state.epoch, config.evaluation.every_epochs):
                _evaluate(session, evaluations)
                stopped = _overoptimised(session)
            last = last or stopped
            if last or _due(state.epoch, config.checkpoints.every_epochs):
                _checkpoint(session)
    _finish(session, evaluations, stopped=stopped)
    return session.run.path


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


def _evaluate(session: Session, folder: Path) -> None:
    """Evaluates the (averaged) weights, logs and saves the result."""
    state = session.state
    with state.ema.applied():
        result = session.evaluator(state.policy, state.reward, session.heldout)
    if session.processes.is_main:
        summary = result.summary()
        result.save(folder, f"epoch_{state.epoch:06d}")
        session.tracker.log({f"eval/{name}": measure.mean for name, measure in summary.items()}, step=state.epoch)
        text = "  ".join(f"{name} {measure}" for name, measure in summary.items() if not name.startswith("ode/"))
        session.progress.line(f"evaluation at epoch {state.epoch}: {text}")
        save_record(folder, state.epoch, summary, _judge(session, folder))


def _judge(session: Session, folder: Path) -> list[Finding]:
    """Compares the held-out rewards with their best evaluations; warns, counts, and keeps the best weights."""
    state, heldout, options = session.state, session.heldout, session.state.config.evaluation
    if heldout is None or options.overoptimisation_threshold == 0:
        return []
    history, signs = read_history(folder, state.reward, session.evaluator.texts), heldout_signs(heldout)
    findings = find(history, signs, threshold=options.overoptimisation_threshold)
    caught = [finding for finding in findings if finding.over_optimised]
    state.overoptimised = state.overoptimised + 1 if caught else 0
    for finding in caught:
        session.progress.line(f"WARNING: over-optimisation at epoch {state.epoch}: {finding}")
    measured = {f"eval/{finding.reward}/z_since_best": finding.heldout_z for finding in findings}
    session.tracker.log(scalars({**measured, "eval/overoptimised": float(state.overoptimised)}), step=state.epoch)
    if options.stop_on_overoptimisation:
        keep_best(session.run.path, history, signs, state.export)
    return findings


def _overoptimised(session: Session) -> bool:
    """Whether to stop, after so many evaluations in a row that found over-optimisation; agreed by all processes."""
    options, state = session.state.config.evaluation, session.state
    if not options.stop_on_overoptimisation:
        return False
    state.overoptimised = int(str(session.processes.gather_json(state.overoptimised)[0]))
    stop = state.overoptimised >= options.overoptimisation_patience
    if stop:
        session.progress.line(f"stopped at epoch {state.epoch}: {state.overoptimised} such evaluations in a row")
    return stop


def _checkpoint(session: Session) -> None:
    state = session.state
    state.save(checkpoint_path(session.run.path, state.epoch), session.processes)
    if session.processes.is_main:
        prune(session.run.path, state.config.checkpoints.keep_last)


def _finish(session: Session, evaluations: Path, *, stopped: bool) -> None:
    """Exports the weights and ends the run with the comparison of its first evaluation and that of these weights."""
    if not session.processes.is_main:
        return
    state, run = session.state, session.run
    best = best_weights(run.path) if stopped else None
    if best is None:
        state.export(run.lora)
    else:
        shutil.copytree(best, run.lora, dirs_exist_ok=True)
        session.progress.line(f"the weights of the best evaluation ({best.name}) are exported, not the last ones")
    chosen = f"epoch_{state.epoch:06d}" if best is None else best.name
    texts = session.evaluator.texts
    before = Evaluation.load(evaluations, "epoch_000000", texts).rescored(state.reward)
    after = Evaluation.load(evaluations, chosen, texts).rescored(state.reward)
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
