"""What people look at: the line of an epoch, the metrics row, and the table and picture that end a run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image
from torch import Tensor

from ddpo.pipeline.input_images import inputs_of
from ddpo.sampling.entropy import path_entropy, step_entropies
from ddpo.trajectory import Trajectory
from rewards import Scores
from rewards.tools.table import table
from trainers.epoch.binding import Collected
from trainers.epoch.constraints import ConstraintReport
from trainers.epoch.credit import Credit, Foresight
from trainers.epoch.critic import FitReport
from trainers.epoch.path_kl import EpochKL
from trainers.epoch.state import TrainState
from trainers.epoch.update import UpdateReport
from trainers.evaluation.evaluator import Evaluation
from trainers.evaluation.statistics import Measure, numbered, population
from trainers.prompts import Prompt
from trainers.run_folder.folder import Metric
from trainers.run_folder.ledger import replace_text, replaced
from trainers.tracking.metrics import Stopwatch, memory_gib
from trainers.tracking.pictures import side_by_side, spread

BEFORE_AFTER = "before_after.png"
EPOCH_LINE = {
    "epoch": "epoch {:>4}",
    "reward/mean": "reward {:.4f}",
    "kl/path_nats": "KL {:.3g} nats",
    "kl/conditional_path_nats": "conditional KL {:.3g} nats",
    "policy/clip_fraction": "clipped {:.1%}",
    "policy/pair_accuracy": "pairs {:.1%}",
    "optimizer/grad_norm": "grad {:.3g}",
    "images_per_second": "{:.1f} images/s",
}
WALL_CLOCK = ("seconds/", "time/", "images_per_second", "memory_gib")


def epoch_row(
    state: TrainState, collected: Collected, report: UpdateReport, clock: Stopwatch, *, fitted: FitReport | None = None
) -> dict[str, Metric]:
    """The metrics of an epoch. Keys beginning with one of `WALL_CLOCK` vary between runs; others are exact.

    Args:
        state: After the epoch.
        collected: Its data.
        report: Its updates.
        clock: Its phases.
        fitted: Its critic's updates; None without one.
    """
    kl = collected.kl
    seconds = sum(clock.seconds.values())
    return {
        "epoch": state.epoch,
        "samples": state.counts.samples,
        "updates": state.learner.counts.updates,
        **({} if collected.scores is None else _rewards(collected.scores, collected.prompts)),
        **({} if kl is None else _kl(kl, guided=is_sampling_policy(state))),
        **({} if collected.credit is None else _credit(collected.credit, shaped=bool(state.config.shaping.steps))),
        **({} if fitted is None else {"critic/loss": fitted.loss, "critic/grad_norm": fitted.grad_norm}),
        **{name if "/" in name else f"policy/{name}": mean for name, mean in report.overall.items()},
        **({} if report.drift is None else {"policy/gate_nats": float(report.drift.nan_to_num(0.0).max())}),
        "optimizer/grad_norm": report.grad_norm,
        "optimizer/learning_rate": report.learning_rate,
        "optimizer/skipped": report.skipped,
        **{f"optimizer/{name}": value for name, value in report.measured.items()},
        **({"evaluation/overoptimised": state.counts.overoptimised} if state.config.heldout_rewards else {}),
        **({} if kl is None else {"per_step/kl_nats": kl.per_step.tolist(), **_entropy(collected.samples.trajectory)}),
        **({} if report.drift is None else {"per_step/gate_nats": report.drift.tolist()}),
        **_explained(collected.credit),
        **{f"per_step/{name}": means.tolist() for name, means in report.per_step.items()},
        **{f"seconds/{phase}": value for phase, value in clock.seconds.items()},
        "time/total_seconds": state.counts.seconds,
        "images_per_second": len(collected.prompts) / seconds,
        "memory_gib": memory_gib(state.policy.device),
    }


def _rewards(scores: Scores, prompts: Sequence[Prompt]) -> dict[str, Metric]:
    """Of the total, with the standard error of its mean, and the mean of each component."""
    total = Measure.of(scores.total, numbered([prompt.group for prompt in prompts]))
    return {
        "reward/mean": float(scores.total.mean()),
        **({} if total.error is None else {"reward/mean_se": total.error}),
        "reward/std": float(scores.total.std()),
        **{f"reward/{name}": float(values.mean()) for name, values in scores.components.items()},
    }


def _credit(credit: Credit, *, shaped: bool) -> dict[str, Metric]:
    """What became of the scores."""
    return {
        "kl/alpha": credit.alpha,
        **_constraints(credit.constraints),
        **({} if credit.foresight is None else _foresight(credit.foresight)),
        **({"shaping/explained": credit.shaping} if shaped else {}),
        "advantages/zero_variance_groups": credit.advantages.zero_variance_groups,
        "advantages/clipped": credit.advantages.clipped,
        **({} if (ratio := credit.advantages.variance_ratio) is None else {"advantages/variance_ratio": ratio}),
    }


def _foresight(foresight: Foresight) -> dict[str, Metric]:
    """How well a critic expected what came, over all steps."""
    return {"critic/explained_variance": float(foresight.explained.nanmean()), "critic/value_error": foresight.error}


def _explained(credit: Credit | None) -> dict[str, Metric]:
    """Of every step, where there is a critic."""
    found = None if credit is None else credit.foresight
    return {} if found is None else {"per_step/explained_variance": found.explained.tolist()}


def is_sampling_policy(state: TrainState) -> bool:
    """Whether the policy that is trained, whose KL is measured, is the one that samples, guidance and all."""
    config = state.config
    return config.objective.build().demand.guidance or config.sampler.guidance_scale <= 1


def _kl(kl: EpochKL, *, guided: bool) -> dict[str, Metric]:
    """The path KL, with its standard error where it is an estimate, and what full noise would make of it.

    That of a conditional policy which is trained while the guided one samples has a name of its own.
    """
    prefix = "kl/" if guided else "kl/conditional_"
    known = kl.of_all is None and kl.standard_error is not None
    estimate = {f"{prefix}path_nats_se": kl.standard_error} if known else {}
    full_noise = {} if kl.full_noise is None else {f"{prefix}full_noise_nats": kl.full_noise}
    return {f"{prefix}path_nats": kl.mean, **estimate, **full_noise}


def _entropy(trajectory: Trajectory) -> dict[str, Metric]:
    """The differential entropy of the chain and of each of its steps; NaN where a step has no noise."""
    schedule, num_dims = trajectory.schedule, trajectory.final[0].numel()
    steps = step_entropies(schedule, num_dims=num_dims)
    return {
        "chain/entropy_nats": path_entropy(schedule, num_dims=num_dims),
        "per_step/entropy_nats": steps.masked_fill(~schedule.stochastic.cpu(), math.nan).tolist(),
    }


def _constraints(report: ConstraintReport) -> dict[str, Metric]:
    """Mean, multiplier (before this epoch's update) and weight of every constraint."""
    facts = {"mean": report.means, "multiplier": report.multipliers, "weight": report.weights}
    return {f"constraint/{name}/{fact}": value for fact, values in facts.items() for name, value in values.items()}


def scalars(row: Mapping[str, Metric]) -> dict[str, float]:
    """A metrics row for trackers: numbers only, a list as one entry per step (`per_step/kl_nats/03`)."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/{k:02d}": float(item) for k, item in enumerate(value)}
        else:
            flat[name] = float(value)  # type: ignore[arg-type]
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def epoch_line(row: Mapping[str, Metric]) -> str:
    """One line for the terminal: what there is of reward, KL, clipping, gradient and speed."""
    parts = [template.format(row[name]) for name, template in EPOCH_LINE.items() if name in row]
    return "  ".join(parts)


def comparison(before: Evaluation, after: Evaluation) -> str:
    """The table that ends a run: before, after, the paired difference, and what the standard errors speak of."""
    new, changes = after.summary(), after.changes(before)
    rows = [
        (name, str(old), str(new[name]), changes[name].signed, changes[name].in_errors)
        for name, old in before.summary().items()
    ]
    text = table(("", "pretrained", "fine-tuned", "difference", "in SE"), rows, right=True)
    return f"{text}\n{population(before.prompts)}"


def write_comparison(
    folder: Path,
    before: Evaluation,
    after: Evaluation,
    *,
    num_pictures: int,
    metadata: Sequence[Mapping[str, object]] | None = None,
    name: str = "summary",
) -> str:
    """Writes `<name>.txt`, `<name>.json` and `before_after.png` into a folder and returns the table.

    With `metadata` of each image, the picture also shows the input images that it names.
    """
    text = comparison(before, after)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.txt", text + "\n")
    new, changes = after.summary(), after.changes(before)
    record = {
        key: {"before": vars(old), "after": vars(new[key]), "difference": vars(changes[key])}
        for key, old in before.summary().items()
    }
    replace_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    shown = spread(len(before.prompts), num_pictures)
    picture = side_by_side(
        before.pictures()[shown],
        after.pictures()[shown],
        [before.prompts[i] for i in shown],
        before.totals[shown].tolist(),
        after.totals[shown].tolist(),
        inputs=None if metadata is None else shown_inputs([metadata[i] for i in shown], before.images),
    )
    with replaced(folder / BEFORE_AFTER) as partial:
        picture.save(partial, format="png")
    return text


def shown_inputs(metadata: Sequence[Mapping[str, object]], images: Tensor) -> list[Image] | None:
    """The input images of prompts, at the size of pictures (B, 3, H, W); None where there are none."""
    return inputs_of(metadata, (images.shape[-1], images.shape[-2]))
