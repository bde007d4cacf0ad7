"""What people look at: the line of an epoch, the metrics row, and the table and picture that end a run."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image
from torch import Tensor

from ddpo.input_images import inputs_of
from trainers.collection import Collected
from trainers.evaluation import Evaluation, Measure
from trainers.metrics import Stopwatch, memory_gib
from trainers.pictures import side_by_side, spread
from trainers.run import Metric
from trainers.state import TrainState
from trainers.update import UpdateReport

BEFORE_AFTER = "before_after.png"
WALL_CLOCK = ("seconds/", "time/", "images_per_second", "memory_gib")


def epoch_row(state: TrainState, collected: Collected, report: UpdateReport, clock: Stopwatch) -> dict[str, Metric]:
    """The metrics of an epoch. Keys beginning with one of `WALL_CLOCK` vary between runs; others are exact.

    Args:
        state: After the epoch.
        collected: Its samples.
        report: Its updates.
        clock: Its phases.
    """
    total = collected.scores.total
    seconds = sum(clock.seconds.values())
    return {
        "epoch": state.epoch,
        "samples": state.samples,
        "updates": state.updates,
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std()),
        **{f"reward/{name}": float(values.mean()) for name, values in collected.scores.components.items()},
        "kl/path_nats": collected.path_kl,
        "kl/alpha": collected.alpha,
        **_constraints(collected),
        **({"shaping/explained": collected.shaping} if state.config.shaping.steps else {}),
        "advantages/zero_variance_groups": collected.advantages.zero_variance_groups,
        "advantages/clipped": collected.advantages.clipped,
        "policy/clip_fraction": report.overall["clipped"],
        "policy/log_ratio": report.overall["log_ratio"],
        **({"policy/step_kl_nats": report.overall["kl"]} if "kl" in report.overall else {}),
        "policy/gate_nats": float(report.gate.nan_to_num(0.0).max()),
        "optimizer/grad_norm": report.grad_norm,
        "optimizer/learning_rate": report.learning_rate,
        "optimizer/skipped": report.skipped,
        **({"evaluation/overoptimised": state.overoptimised} if state.config.heldout_rewards else {}),
        "per_step/kl_nats": collected.kl_per_step.tolist(),
        "per_step/gate_nats": report.gate.tolist(),
        "per_step/log_ratio": report.per_step["log_ratio"].tolist(),
        "per_step/clip_fraction": report.per_step["clipped"].tolist(),
        **{f"seconds/{phase}": value for phase, value in clock.seconds.items()},
        "time/total_seconds": state.seconds,
        "images_per_second": len(total) / seconds,
        "memory_gib": memory_gib(state.policy.device),
    }


def _constraints(collected: Collected) -> dict[str, Metric]:
    """Mean, multiplier (before this epoch's update) and weight of every constraint."""
    under = collected.constraints
    facts = {"mean": under.means, "multiplier": under.multipliers, "weight": under.weights}
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
    """One line for the terminal."""
    return (
        f"epoch {row['epoch']:>4}  reward {row['reward/mean']:.4f}  KL {row['kl/path_nats']:.3g} nats  "
        f"clipped {100 * row['policy/clip_fraction']:.1f}%  grad {row['optimizer/grad_norm']:.3g}  "  # type: ignore[operator]
        f"{row['images_per_second']:.1f} images/s"
    )


def comparison(before: Evaluation, after: Evaluation) -> str:
    """The table that ends a run: before, after, and the paired difference with its standard error."""
    rows = [("", "pretrained", "fine-tuned", "difference", "in SE")]
    for name, old in before.summary().items():
        new = Measure.of(after.values[name])
        change = Measure.of(after.values[name] - before.values[name])
        ratio = f"{change.mean / change.error:+.1f}" if change.error else ""
        rows.append((name, str(old), str(new), _signed(change), ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5))]) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


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
    table = comparison(before, after)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(table + "\n")
    record = {
        key: {"before": vars(old), "after": vars(Measure.of(after.values[key]))}
        for key, old in before.summary().items()
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    shown = spread(len(before.prompts), num_pictures)
    picture = side_by_side(
        before.pictures()[shown],
        after.pictures()[shown],
        [before.prompts[i] for i in shown],
        before.values["reward"][shown].tolist(),
        after.values["reward"][shown].tolist(),
        inputs=None if metadata is None else shown_inputs([metadata[i] for i in shown], before.images),
    )
    picture.save(folder / BEFORE_AFTER)
    return table


def shown_inputs(metadata: Sequence[Mapping[str, object]], images: Tensor) -> list[Image] | None:
    """The input images of prompts, at the size of pictures (B, 3, H, W); None where there are none."""
    return inputs_of(metadata, (images.shape[-1], images.shape[-2]))


def _signed(measure: Measure) -> str:
    return f"{measure.mean:+.4g}" + ("" if measure.error is None else f" ± {measure.error:.2g}")
