"""Fits one scorer to pairs by the Bradley-Terry model (Bradley & Terry 1952; Christiano et al. 2017, eq. 1).

    P(a > b) = sigmoid(r(a) - r(b))
    loss     = - mean [ y log P(a > b) + (1 - y) log P(b > a) ] + gauge * mean [ (r(a) + r(b)) / 2 ]^2

y is 1, 0, or 1/2 for a tie. The likelihood does not see a function of the prompt added to r; the second term pins it,
so that members of an ensemble agree on zero and their spread at a picture means something.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rewards.base import UserError
from rewards.preferences.features import PairFeatures
from rewards.preferences.networks import CaptionedCnn, Scorer

_EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How scorers are fitted.

    Attributes:
        members: Scorers of the ensemble, each with its own first weights and bootstrap sample of the training pairs.
        epochs: Passes over the training pairs, at most.
        patience: Passes without a better validation loss before a member stops.
        batch_size: Pairs in a gradient step.
        learning_rate: Peak of AdamW's; falls to zero along a cosine over `epochs`.
        weight_decay: Decoupled weight decay.
        gauge: Weight of the term that pins the zero of the scores.
        shift: The CNN sees pictures moved by up to so many pixels, edges repeated; 0 for none.
        mirror: The CNN sees half of the pictures mirrored; only where no caption tells left from right.
        validation: Share of the prompts that decides when to stop, and the temperature.
        heldout: Share of the prompts on which accuracy and calibration are reported.
        side: Of the square that the CNN sees, pixels: 16, 32, 64 or 128.
        seed: Of the split, the bootstrap, the first weights and the order.
    """

    members: int = 4
    epochs: int = 30
    patience: int = 6
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    gauge: float = 1e-3
    shift: int = 2
    mirror: bool = False
    validation: float = 0.1
    heldout: float = 0.2
    side: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("members", "epochs", "patience", "batch_size"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("weight_decay", "gauge", "shift", "seed"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("validation", "heldout"):
            _check(0 < getattr(self, name) < 1, name, getattr(self, name), "between 0 and 1")
        _check(self.validation + self.heldout < 1, "validation + heldout", self.validation + self.heldout, "below 1")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        _check(self.side in (16, 32, 64, 128), "side", self.side, "16, 32, 64 or 128")


def _check(fine: bool, name: str, value: float, wanted: str) -> None:
    if not fine:
        raise UserError(f"{name} must be {wanted}, got {value}")


def negative_log_likelihood(difference: Tensor, label: Tensor) -> Tensor:
    """Bradley-Terry, nats a pair: `(M,)` score differences r(a) - r(b) and labels in [0, 1] to `(M,)`."""
    return functional.binary_cross_entropy_with_logits(difference, label, reduction="none")


def differences(scorer: Scorer, pairs: PairFeatures) -> Tensor:
    """r(a) - r(b) of pairs, `(M,)`, without gradient; every picture of a caption is scored once."""
    scorer.eval()
    distinct, where = torch.unique(pairs.keys, return_inverse=True)
    with torch.no_grad():
        parts = [_score(scorer, *_select(pairs, part)) for part in distinct.split(_EVALUATION_BATCH)]
    first, second = torch.cat(parts)[where].chunk(2)
    return first - second


def fit_member(
    make: Callable[[], Scorer],
    train: PairFeatures,
    validation: PairFeatures,
    config: FitConfig,
    *,
    member: int,
    on_epoch: Callable[[int, float], None],
) -> tuple[Scorer, list[float]]:
    """Fits one member on a bootstrap sample, and keeps the weights of the best validation loss.

    Comparisons (`PairFeatures.group`), not pairs, are drawn, with replacement, and pairs of a comparison go into one
    step (Ouyang et al. 2022, section 3.5): its pictures are scored once, and pairs that share a picture do not make
    several independent steps out of one fact.

    Args:
        make: A new scorer, from torch's global generator.
        train: Labelled pairs.
        validation: Labelled pairs of other prompts.
        config: How.
        member: Its number, which with the seed decides all that is random.
        on_epoch: Told the epoch, from 1, and its validation loss.

    Returns:
        The scorer and the validation loss after every epoch, nats a pair.
    """
    generator = torch.Generator().manual_seed(1000 * config.seed + member)
    with torch.random.fork_rng():
        torch.manual_seed(1000 * config.seed + member)
        scorer = make()
    groups = _by_group(train.group)
    if config.members > 1:
        groups = [groups[i] for i in torch.randint(len(groups), (len(groups),), generator=generator).tolist()]
    steps = config.epochs * math.ceil(sum(map(len, groups)) / config.batch_size)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    best = copy.deepcopy(scorer.state_dict())
    for epoch in range(1, config.epochs + 1):
        scorer.train()
        order = torch.randperm(len(groups), generator=generator).tolist()
        for rows in torch.cat([groups[i] for i in order]).split(config.batch_size):
            optimizer.zero_grad()
            _loss(scorer, train.subset(rows), config, generator).backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        label = validation.label.to(validation.images.device)
        losses.append(float(negative_log_likelihood(differences(scorer, validation), label).mean()))
        on_epoch(epoch, losses[-1])
        if losses[-1] == min(losses):
            best = copy.deepcopy(scorer.state_dict())
        if epoch - 1 - losses.index(min(losses)) >= config.patience:
            break
    scorer.load_state_dict(best)
    return scorer.eval().requires_grad_(False), losses


def _by_group(group: Tensor) -> list[Tensor]:
    """The rows of each group."""
    order = torch.argsort(group, stable=True)
    _, counts = torch.unique(group, return_counts=True)
    return list(order.split(counts.tolist()))


def _loss(scorer: Scorer, pairs: PairFeatures, config: FitConfig, generator: torch.Generator) -> Tensor:
    distinct, where = torch.unique(pairs.keys, return_inverse=True)
    images, captions = _select(pairs, distinct)
    if isinstance(scorer, CaptionedCnn):
        images = _varied(images, config, generator)
    first, second = _score(scorer, images, captions)[where].chunk(2)
    likelihood = negative_log_likelihood(first - second, pairs.label.to(first.device)).mean()
    return likelihood + config.gauge * ((first + second) / 2).square().mean()


def _score(scorer: Scorer, images: Tensor, captions: Tensor) -> Tensor:
    return scorer.score(images, scorer.read(captions))


def _select(pairs: PairFeatures, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and captions of the numbers that `PairFeatures.keys` gives them."""
    count = len(pairs.captions)
    return pairs.images[keys // count], pairs.captions[keys % count]


def _varied(images: Tensor, config: FitConfig, generator: torch.Generator) -> Tensor:
    """The batch moved by one random offset along each axis, and each picture mirrored or not."""
    if config.shift:
        down, right = torch.randint(0, 2 * config.shift + 1, (2,), generator=generator).tolist()
        padded = functional.pad(images, (config.shift,) * 4, mode="replicate")
        images = padded[..., down : down + images.shape[-2], right : right + images.shape[-1]]
    if config.mirror:
        turned = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(turned[:, None, None, None].to(images.device), images.flip(-1), images)
    return images
