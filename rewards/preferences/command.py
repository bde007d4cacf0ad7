"""`ddpo rewards fit`: from labelled pairs to a folder with a reward, its report and its plot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rewards.base import UserError
from rewards.preferences.encoders import REWARD
from rewards.preferences.figure import draw
from rewards.preferences.fit import Fit, fit_pairs
from rewards.preferences.fitting import FitConfig
from rewards.preferences.pairs import Pair, as_entry, read_pairs


def fit_reward(
    file: Path, output: Path, *, encoder: str = "cnn", config: FitConfig | None = None, device: str = "cpu"
) -> str:
    """Fits a reward to a file of labelled pairs and writes it.

    Args:
        file: Pairs, see `rewards.preferences.pairs`.
        output: Folder to make: the reward, `report.json`, `report.png`, `heldout.jsonl`.
        encoder: See `rewards.preferences.encoders`.
        config: How.
        device: Where to train.

    Returns:
        What was found, for people.

    Raises:
        UserError: Malformed lines, too few prompts, an encoder that is not to be had, or an output that exists.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; choose another --out, or remove it")
    pairs = read_pairs(file, labelled=True)
    fitted = fit_pairs(pairs, encoder=encoder, config=config or FitConfig(), device=device, show=True)
    with _made_whole(output) as folder:
        _write(folder, output, fitted, pairs, report(fitted, encoder, config or FitConfig()))
    return describe(fitted, output)


@contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` at the end: what a kill leaves behind is in nobody's way."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    if output.is_dir():
        output.rmdir()  # it is empty
    partial.rename(output)


def _write(folder: Path, output: Path, fitted: Fit, pairs: Sequence[Pair], facts: Mapping[str, object]) -> None:
    """Writes everything into a folder that will be called `output`."""
    fitted.ensemble.save(folder)
    (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    lines = []
    columns = (fitted.rows, fitted.difference.tolist(), fitted.disagreement.tolist())
    for row, difference, disagreement in zip(*columns, strict=True):
        entry = {**as_entry(pairs[row], output), "pair": row, "log_odds": difference, "disagreement": disagreement}
        lines.append(json.dumps(entry) + "\n")
    (folder / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    draw(fitted, folder / "report.png")


def report(fitted: Fit, encoder: str, config: FitConfig) -> dict[str, object]:
    """What `report.json` says."""
    return {
        "encoder": encoder,
        "temperature": fitted.ensemble.config.temperature,
        "pairs": {name: count for name, (count, _) in fitted.counts.items()},
        "prompts": {name: count for name, (_, count) in fitted.counts.items()},
        "validation": asdict(fitted.validation),
        "held-out": asdict(fitted.heldout),
        "members' held-out accuracy": fitted.members,
        "validation loss by epoch": fitted.losses,
        "seconds": round(fitted.seconds, 1),
        "options": asdict(config),
    }


def describe(fitted: Fit, output: Path) -> str:
    """What the command prints."""
    heldout = fitted.heldout
    counts = ", ".join(f"{count} {name} pairs of {prompts} prompts" for name, (count, prompts) in fitted.counts.items())
    alone = [accuracy for accuracy in fitted.members if accuracy is not None]
    lines = [counts]
    if heldout.accuracy is None:
        lines.append("held-out pairs are all ties: no accuracy")
    else:
        members = f" (members alone {min(alone):.3f} to {max(alone):.3f})" if len(alone) > 1 else ""
        error = "" if heldout.accuracy_error is None else f" ± {heldout.accuracy_error:.3f}"
        lines.append(f"held-out accuracy {heldout.accuracy:.3f}{error}{members}")
    lines += [
        f"held-out loss {heldout.loss:.3f} nats a pair (0.693 knows nothing), calibration error {heldout.ece:.3f} "
        f"({heldout.ece_floor:.3f} at {heldout.num_pairs} pairs if the probabilities were right)",
        f"temperature {fitted.ensemble.config.temperature:.3g}, {fitted.seconds:.0f} s",
        f"{output}: report.png, report.json, heldout.jsonl; use it as {{name: {REWARD}, options: {{path: {output}}}}} "
        f"or ddpo rewards test {REWARD} --options '{json.dumps({'path': str(output)})}'",
    ]
    return "\n".join(lines)
