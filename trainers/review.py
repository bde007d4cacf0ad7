"""Evaluations during a run: when one is due, what is saved of it, and what it says about the held-out rewards."""

from trainers.overoptimisation import Finding, best_epoch, find, forget_worse, heldout_signs, read_history, save_record
from trainers.report import scalars
from trainers.session import Session


def due(epoch: int, every: int) -> bool:
    """Whether something that happens every so many epochs (0: never) happens after this one."""
    return every > 0 and epoch % every == 0


def lacks_evaluation(session: Session, *, last: bool) -> bool:
    """Whether an evaluation is due that there is not: at the start, or where a signal or a reward stopped it.

    Args:
        session: The run.
        last: Whether it is to end here.
    """
    state, config = session.state, session.state.config
    wanted = last or state.epoch == 0 or due(state.epoch, config.evaluation.every_epochs)
    exists = (session.run.evaluations / f"epoch_{state.epoch:06d}.safetensors").is_file()
    return wanted and not session.processes.agreed(exists)


def evaluate(session: Session) -> None:
    """Evaluates the (averaged) weights, logs and saves the result, and keeps the weights if they are the best."""
    state, run = session.state, session.run
    with state.ema.applied():
        result = session.evaluator(session.evaluated, state.reward, session.heldout)
    improved = False
    if session.processes.is_main:
        summary = result.summary()
        result.save(run.evaluations, f"epoch_{state.epoch:06d}")
        session.tracker.log({f"eval/{name}": measure.mean for name, measure in summary.items()}, step=state.epoch)
        text = "  ".join(f"{name} {measure}" for name, measure in summary.items() if not name.startswith("ode/"))
        session.progress.line(f"evaluation at epoch {state.epoch}: {text}")
        findings, improved = _judge(session)
        save_record(run.evaluations, state.epoch, summary, findings)
    if state.config.evaluation.stop_on_overoptimisation and session.processes.agreed(improved):
        state.export(run.path / "best" / f"epoch_{state.epoch:06d}", session.processes)
        if session.processes.is_main:
            forget_worse(run.path, state.epoch)


def _judge(session: Session) -> tuple[list[Finding], bool]:
    """Compares the held-out rewards with their best evaluations, warns, counts; and whether this one is best."""
    state, heldout, options = session.state, session.heldout, session.state.config.evaluation
    if heldout is None or options.overoptimisation_threshold == 0:
        return [], False
    history = read_history(session.run.evaluations, state.reward, session.evaluator.texts)
    signs = heldout_signs(heldout)
    findings = find(history, signs, threshold=options.overoptimisation_threshold)
    caught = [finding for finding in findings if finding.over_optimised]
    state.overoptimised = state.overoptimised + 1 if caught else 0
    for finding in caught:
        session.progress.line(f"WARNING: over-optimisation at epoch {state.epoch}: {finding}")
    measured = {f"eval/{finding.reward}/z_since_best": finding.heldout_z for finding in findings}
    session.tracker.log(scalars({**measured, "eval/overoptimised": float(state.overoptimised)}), step=state.epoch)
    return findings, best_epoch(history, signs) == state.epoch


def is_overoptimised(session: Session) -> bool:
    """Whether to stop, after so many evaluations in a row that found over-optimisation; agreed by all processes."""
    state = session.state
    stop = session.processes.agreed(state.stops_early)
    if stop:
        session.progress.line(
            f"stopped at epoch {state.epoch}: over-optimisation in {state.overoptimised} evaluations in a row"
        )
    return stop
