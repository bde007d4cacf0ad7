"""The end of a run: exported weights, and the comparison of the pretrained and the fine-tuned model."""

import shutil

from trainers.checkpoint import checkpoint_epoch
from trainers.evaluation import Evaluation
from trainers.model_card import write_model_card
from trainers.overoptimisation import best_weights
from trainers.pictures import save_curves, spread, to_pil
from trainers.report import BEFORE_AFTER, write_comparison
from trainers.run import read_metrics
from trainers.session import Session
from trainers.tracking import Picture

CURVES = ("reward/mean", "kl/path_nats", "policy/clip_fraction", "optimizer/grad_norm", "policy/gate_nats", "kl/alpha")


def finish(session: Session, *, stopped: bool) -> None:
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
    epoch = state.epoch if best is None else checkpoint_epoch(best)
    samples = epoch * session.plan.images_per_epoch
    write_model_card(
        run.lora, state.policy, state.config, epoch=epoch, samples=samples, results=table, picture=BEFORE_AFTER
    )
    save_curves(read_metrics(run.path), CURVES, run.path / "curves.png")
    pictures = [Picture(image=to_pil(after.pictures()[i]), caption=texts[i]) for i in spread(len(texts), shown)]
    session.tracker.images("final", pictures, step=state.epoch)
    print(f"\n{table}\n\npicture: {run.path / BEFORE_AFTER}\nweights: {run.lora}", flush=True)  # noqa: T201
