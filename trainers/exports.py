"""The end of a run: exported weights, and the comparison of the pretrained and the fine-tuned model."""

import shutil
from pathlib import Path

from trainers.diagnosis.course import read_course
from trainers.epoch.report import BEFORE_AFTER, write_comparison
from trainers.evaluation.evaluator import Evaluation
from trainers.evaluation.overoptimisation import first_scales
from trainers.report.page import REPORT, save_report
from trainers.report.subject import read_subject
from trainers.run_folder import ledger
from trainers.run_folder.checkpoint import checkpoint_epoch
from trainers.run_folder.model_card import write_model_card
from trainers.session import Session
from trainers.tracking.first_look import drawn
from trainers.tracking.pictures import caption, save_curves, spread, to_pil
from trainers.tracking.progress import say
from trainers.tracking.tracker import Picture


def finish(session: Session, *, stopped: bool) -> None:
    """Exports the weights and ends the run with the comparison of its first evaluation and that of these weights."""
    state, run = session.state, session.run
    best = run.best_weights() if stopped else None
    partial = run.lora.with_name(f".partial_{run.lora.name}")
    if session.processes.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    with ledger.told(run.lora, intact=f"all epochs are saved; make room and run ddpo train --resume {run.path}"):
        if best is None:
            state.export(partial, session.processes)
        elif session.processes.is_main:
            shutil.copytree(best, partial)
            session.progress.line(f"the weights of the best evaluation ({best.name}) are exported, not the last ones")
    if not session.processes.is_main:
        return
    epoch = state.epoch if best is None else checkpoint_epoch(best)
    texts = session.evaluator.texts
    scales = first_scales(run, state.reward, texts)
    before, after = (Evaluation.load(run.evaluated(at), texts).rescored(scales, epoch=state.epoch) for at in (0, epoch))
    shown = state.config.tracking.num_pictures
    table = write_comparison(run.path, before, after, num_pictures=shown, metadata=session.evaluator.metadata)
    shutil.copy(run.path / BEFORE_AFTER, partial / BEFORE_AFTER)
    samples = epoch * session.plan.images_per_epoch
    write_model_card(
        partial, state.policy, state.config, epoch=epoch, samples=samples, results=table, picture=BEFORE_AFTER
    )
    course = read_course(run, state.config)
    rows = [*course.rows, *course.evaluation_rows]
    with ledger.replaced(run.path / "curves.png") as picture:
        save_curves(rows, drawn({key: None for row in rows for key in row}), picture)
    _publish(partial, run.lora)
    report = save_report([read_subject(run.path, state.config).ended], run.path / REPORT)
    session.tracker.page("report", report, step=state.epoch)
    totals = after.values.get("reward")  # none where images are judged by a file
    captions = texts if totals is None else [caption(*pair) for pair in zip(texts, totals.tolist(), strict=True)]
    pictures = [Picture(image=to_pil(after.pictures()[i]), caption=captions[i]) for i in spread(len(texts), shown)]
    session.tracker.images("final", pictures, step=state.epoch)
    say(f"\n{table}\n\npicture: {run.path / BEFORE_AFTER}\nreport: {report}\nweights: {run.lora}")


def _publish(partial: Path, folder: Path) -> None:
    """Puts a folder in its place, whole; what is in the old one besides is kept."""
    old = folder.with_name(f".replaced_{folder.name}")
    if folder.is_dir():
        _keep_others(old, folder)  # of a publication that was killed
        folder.rename(old)
    partial.rename(folder)
    _keep_others(old, folder)


def _keep_others(old: Path, folder: Path) -> None:
    """Moves what a folder lacks over from an old one, which is removed."""
    for path in old.iterdir() if old.is_dir() else ():
        if not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(old, ignore_errors=True)
