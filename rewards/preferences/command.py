"""`ddpo rewards fit`: from labelled pairs to a folder with a reward, its report and its plot."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewards.preferences.calibration import Quality, fit_temperature, measure
from rewards.preferences.encoders import REWARD, make_encoder
from rewards.preferences.ensemble import Ensemble, EnsembleConfig
from rewards.preferences.features import PairFeatures, encode
from rewards.preferences.fitting import FitConfig, differences, fit_member
from rewards.preferences.networks import Scorer
from rewards.preferences.pairs import Pair, as_entry, read_pairs, split_by_prompt
from rewards.preferences.vocabulary import Vocabulary

TRAIN, VALIDATION, HELDOUT = 0, 1, 2
_PARTS = ("training", "validation", "held-out")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted reward and what is known about it.

    Attributes:
        ensemble: the reward.
        counts: pairs and prompts of the training, validation and held-out part.
        losses: validation loss after every epoch of every member, nats a pair.
        validation: quality on the validation pairs (which chose the epoch and the temperature).
        heldout: quality on the held-out pairs.
        members: held-out accuracy of each member alone; None without decided pairs.
        rows: number of each held-out pair in the file's order, from 0.
        labels: of the held-out pairs, (M,).
        difference: calibrated mean difference of the held-out pairs, (M,).
        disagreement: standard deviation over members of sigmoid(r(a) - r(b)), (M,).
        seconds: time taken.
    """

    ensemble: Ensemble
    counts: dict[str, tuple[int, int]]
    losses: list[list[float]]
    validation: Quality
    heldout: Quality
    members: list[float | None]
    rows: list[int]
    labels: Tensor
    difference: Tensor
    disagreement: Tensor
    seconds: float


def fit_reward(
    file: Path, output: Path, *, encoder: str = "cnn", config: FitConfig | None = None, device: str = "cpu"
) -> str:
    """Fit a reward to a file of labelled pairs and write it.

    Args:
        file: pairs, see `rewards.preferences.pairs`.
        output: folder to make: the reward, `report.json`, `report.png`, `heldout.jsonl`.
        encoder: see `rewards.preferences.encoders`.
        config: how.
        device: where to train.

    Returns:
        What was found, for people.

    Raises:
        ValueError: malformed lines, too few prompts, an encoder that is not to be had, or an output that exists.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; choose another --out, or remove it")
    pairs = read_pairs(file, labelled=True)
    fitted = fit_pairs(pairs, encoder=encoder, config=config or FitConfig(), device=device, show=True)
    fitted.ensemble.save(output)
    (output / "report.json").write_text(json.dumps(report(fitted, encoder, config or FitConfig()), indent=1) + "\n")
    lines = []
    columns = (fitted.rows, fitted.difference.tolist(), fitted.disagreement.tolist())
    for row, difference, disagreement in zip(*columns, strict=True):
        entry = {**as_entry(pairs[row], output), "pair": row, "log_odds": difference, "disagreement": disagreement}
        lines.append(json.dumps(entry) + "\n")
    (output / "heldout.jsonl").write_text("".join(lines))
    from rewards.preferences.figure import draw

    draw(fitted, output / "report.png")
    return describe(fitted, output)


def fit_pairs(
    pairs: Sequence[Pair], *, encoder: str, config: FitConfig, device: str = "cpu", show: bool = False
) -> Fit:
    """Fit an ensemble to labelled pairs.

    Args:
        pairs: with labels.
        encoder: see `rewards.preferences.encoders`.
        config: how.
        device: where to train.
        show: whether to show progress on stderr.

    Raises:
        ValueError: too few prompts, or an encoder that is not to be had.
    """
    start = time.perf_counter()
    parts = split_by_prompt([pair.prompt for pair in pairs], (config.validation, config.heldout), seed=config.seed)
    vocabulary = Vocabulary.of(pair.prompt for pair, part in zip(pairs, parts, strict=True) if part == TRAIN)
    where = torch.device(device)
    source = make_encoder(encoder, vocabulary=vocabulary, side=config.side, device=where)
    features = encode(pairs, source, show=show)
    rows = [torch.tensor([row for row, part in enumerate(parts) if part == which]) for which in range(3)]
    train, validation, heldout = (features.subset(part) for part in rows)

    members: list[Scorer] = []
    losses: list[list[float]] = []
    for member in range(config.members):
        bar = _Bar(member, config, show=show)
        scorer, course = fit_member(source.scorer, train, validation, config, member=member, on_epoch=bar.update)
        bar.close()
        members.append(scorer)
        losses.append(course)

    tuning, testing = (_member_differences(members, part) for part in (validation, heldout))
    temperature = fit_temperature(tuning.mean(0), validation.label)
    ensemble = Ensemble(
        EnsembleConfig(
            encoder=encoder,
            words=vocabulary.words,
            length=vocabulary.length,
            side=config.side,
            members=config.members,
            temperature=temperature,
        ),
        source,
        members,
    )
    testing = testing / temperature
    return Fit(
        ensemble=ensemble,
        counts={name: _count(pairs, parts, part) for part, name in enumerate(_PARTS)},
        losses=losses,
        validation=measure(tuning.mean(0) / temperature, validation.label),
        heldout=measure(testing.mean(0), heldout.label),
        members=[measure(difference, heldout.label).accuracy for difference in testing],
        rows=rows[HELDOUT].tolist(),
        labels=heldout.label,
        difference=testing.mean(0),
        disagreement=testing.sigmoid().std(0, correction=0),
        seconds=time.perf_counter() - start,
    )


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
        lines.append(f"held-out accuracy {heldout.accuracy:.3f} ± {heldout.accuracy_error:.3f}{members}")
    lines += [
        f"held-out loss {heldout.loss:.3f} nats a pair (0.693 knows nothing), calibration error {heldout.ece:.3f}",
        f"temperature {fitted.ensemble.config.temperature:.3g}, {fitted.seconds:.0f} s",
        f"{output}: report.png, report.json, heldout.jsonl; use it as {{name: {REWARD}, options: {{path: {output}}}}} "
        f"or ddpo rewards test {REWARD} --options '{json.dumps({'path': str(output)})}'",
    ]
    return "\n".join(lines)


def _member_differences(members: Sequence[Scorer], pairs: PairFeatures) -> Tensor:
    """r(a) - r(b) of every member, (K, M), on the CPU."""
    return torch.stack([differences(member, pairs).cpu() for member in members])


def _count(pairs: Sequence[Pair], parts: Sequence[int], part: int) -> tuple[int, int]:
    prompts = [pair.prompt for pair, own in zip(pairs, parts, strict=True) if own == part]
    return len(prompts), len(set(prompts))


class _Bar:
    """Epochs of one member: a bar in a terminal, else one line when the member is done."""

    def __init__(self, member: int, config: FitConfig, *, show: bool) -> None:
        self._label = f"member {member + 1} of {config.members}"
        self._show = show
        self._best: tuple[float, int] = (float("inf"), 0)
        self._is_terminal = show and sys.stderr.isatty()
        if self._is_terminal:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=config.epochs, desc=self._label, unit="epoch", leave=False, dynamic_ncols=True)

    def update(self, epoch: int, loss: float) -> None:
        """Tells an epoch's validation loss."""
        self._best = min(self._best, (loss, epoch))
        if self._is_terminal:
            self._bar.update()
            self._bar.set_postfix_str(f"validation {loss:.3f}, best {self._best[0]:.3f}")

    def close(self) -> None:
        """Ends the bar with a line."""
        if self._is_terminal:
            self._bar.close()
        if self._show:
            best, epoch = self._best
            sys.stderr.write(f"{self._label}: best validation loss {best:.3f} after {epoch} epochs\n")
