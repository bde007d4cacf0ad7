"""Evaluations during a run: when one is due, what is saved of it, and what it says about the held-out rewards."""

from trainers.epoch.report import scalars
from trainers.evaluation.evaluator import Evaluation
from trainers.evaluation.overoptimisation import (
    Finding,
    Rule,
    best_epoch,
    find,
    first_scales,
    heldout_signs,
    read_history,
    save_record,
)
from trainers.evaluation.statistics import numbered
from trainers.run_folder import ledger
from trainers.run_folder.folder import RunFolder
from trainers.session import Session
from trainers.tracking.first_look import metric_key


def due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs (0: never) is due after this one."""
    return every > 0 and epoch % every == 0


def lacks_evaluation(session: Session, *, last: bool) -> bool:
    """Whether an evaluation is due and missing: at the start, or where a signal or a failing reward stopped it.

    Args:
        session: The run.
        last: Whether it is to end here.
    """
    state, config = session.state, session.state.config
    wanted = last or state.epoch == 0 or due(state.epoch, config.evaluation.every_epochs)
    exists = session.run.evaluation(state.epoch).is_file()
    return wanted and not session.processes.agreed(exists)


def evaluate_start(session: Session) -> None:
    """Makes the first evaluation of a run again, of the pretrained weights, where it is gone."""
    state, run = session.state, session.run
    if state.epoch == 0 or session.processes.agreed(run.evaluation(0).is_file()):
        return
    with session.evaluation_policy.reference():
        result = session.evaluator(session.evaluation_policy, state.reward, session.heldout, epoch=0)
    if session.processes.is_main:
        result = result.rescored(result.scales(state.reward), epoch=0)
        _save(run, 0, result)
        save_record(run, 0, result.summary(), [])
        session.progress.line("the evaluation of the start is made again")


def evaluate(session: Session) -> None:
    """Evaluates the (averaged) weights, logs and saves the result, and keeps the weights if they are the best."""
    state, run = session.state, session.run
    with state.evaluated():
        result = session.evaluator(session.evaluation_policy, state.reward, session.heldout, epoch=state.epoch)
    improved = False
    if session.processes.is_main:
        scales = (
            first_scales(run, state.reward, result.prompts) if run.evaluated_epochs() else result.scales(state.reward)
        )
        result = result.rescored(scales, epoch=state.epoch)
        summary = result.summary()
        _save(run, state.epoch, result)
        session.tracker.log(
            {f"eval/{metric_key(name)}": measure.mean for name, measure in summary.items()}, step=state.epoch
        )
        text = "  ".join(f"{name} {measure}" for name, measure in summary.items() if not name.startswith("ode/"))
        session.progress.line(f"evaluation at epoch {state.epoch}: {text}")
        findings, improved = _judge(session)
        save_record(run, state.epoch, summary, findings)
    if state.config.evaluation.stop_on_overoptimisation and session.processes.agreed(improved):
        state.export(run.best(state.epoch), session.processes)
        if session.processes.is_main:
            run.keep_best(state.epoch)


def _save(run: RunFolder, epoch: int, result: Evaluation) -> None:
    with ledger.noted(run.path, run.relative(run.evaluation(epoch))) as partial:
        result.save(partial)


def _judge(session: Session) -> tuple[list[Finding], bool]:
    """Compares the held-out rewards with their best evaluations, warns, counts, and says whether this is the best."""
    state, heldout, options = session.state, session.heldout, session.state.config.evaluation
    if heldout is None or not options.warns or not state.reward.terms:
        return [], False
    rule = Rule(false_alarms=options.overoptimisation_false_alarms, threshold=options.overoptimisation_threshold)
    history = read_history(session.run, state.reward, session.evaluator.texts, epoch=state.epoch)
    signs = heldout_signs(heldout)
    findings = find(history, signs, numbered(session.evaluator.texts), rule=rule)
    caught = [finding for finding in findings if finding.over_optimised]
    state.counts.overoptimised = state.counts.overoptimised + 1 if caught else 0
    for finding in caught:
        session.progress.line(f"WARNING: over-optimisation at epoch {state.epoch}: {finding}")
    measured = {f"eval/{finding.reward}/z_since_best": finding.heldout_z for finding in findings}
    session.tracker.log(
        scalars({**measured, "eval/overoptimised": float(state.counts.overoptimised)}), step=state.epoch
    )
    return findings, best_epoch(history, signs) == state.epoch


def is_overoptimised(session: Session) -> bool:
    """Whether to stop, after so many evaluations in a row that found over-optimisation; agreed by all processes."""
    state = session.state
    stop = session.processes.agreed(state.stops_early)
    if stop:
        session.progress.line(
            f"stopped at epoch {state.epoch}: over-optimisation in {state.counts.overoptimised} evaluations in a row"
        )
    return stop
