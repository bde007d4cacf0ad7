"""Fits an ensemble to labelled pairs: split by prompt, encode, fit each member, calibrate, measure."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.preferences.calibration import Quality, fit_temperature, measure
from rewards.preferences.encoders import make_encoder
from rewards.preferences.ensemble import Ensemble, EnsembleConfig
from rewards.preferences.features import PairFeatures, encode
from rewards.preferences.fitting import FitConfig, differences, fit_member
from rewards.preferences.networks import Scorer
from rewards.preferences.pairs import Pair, split_by_prompt
from rewards.preferences.vocabulary import Vocabulary

TRAIN, VALIDATION, HELDOUT = 0, 1, 2
_PARTS = ("training", "validation", "held-out")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted reward and what is known about it.

    Attributes:
        ensemble: The reward.
        counts: Pairs and prompts of the training, validation and held-out part.
        losses: Validation loss after every epoch of every member, nats a pair.
        validation: Quality on the validation pairs (which chose the epoch and the temperature).
        heldout: Quality on the held-out pairs.
        members: Held-out accuracy of each member alone; None without decided pairs.
        rows: Number of each held-out pair in the file's order, from 0.
        labels: Of the held-out pairs, (M,).
        difference: Calibrated mean difference of the held-out pairs, (M,).
        disagreement: Standard deviation over members of sigmoid(r(a) - r(b)), (M,).
        seconds: Time taken.
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


def fit_pairs(
    pairs: Sequence[Pair], *, encoder: str, config: FitConfig, device: str = "cpu", show: bool = False
) -> Fit:
    """Fits an ensemble to labelled pairs.

    Args:
        pairs: With labels.
        encoder: See `rewards.preferences.encoders`.
        config: How.
        device: Where to train.
        show: Whether to show progress on stderr.

    Raises:
        UserError: Too few prompts, or an encoder that is not to be had.
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
        validation=measure(tuning.mean(0) / temperature, validation.label, validation.group),
        heldout=measure(testing.mean(0), heldout.label, heldout.group),
        members=[measure(difference, heldout.label).accuracy for difference in testing],
        rows=rows[HELDOUT].tolist(),
        labels=heldout.label,
        difference=testing.mean(0),
        disagreement=testing.sigmoid().std(0, correction=0),
        seconds=time.perf_counter() - start,
    )


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
