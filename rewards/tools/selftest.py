"""Try a reward before a run depends on it.

    varied       different pictures get different scores: a scorer that failed silently returns a constant
    order        pairs of pictures whose order is known for this reward
    batch        a picture's score is the same alone and among others
    repeat       the same call gives the same scores, bit by bit
    precision    float16 and float64 pictures of equal values score as float32 ones
    range        scores lie in the range that is declared
    gradient     where it is declared, the slope along the gradient equals a finite difference

Tolerances are relative to the spread of the scores over the sample pictures, since rewards have no common unit. Along
its own gradient g a smooth score rises by |g| per unit of length: (r(x + h g/|g|) - r(x - h g/|g|)) / 2h = |g|. Several
h are tried, as a large one meets curvature and a small one rounding; the slopes of a score with steps lie on both sides
of |g|. For a reward that compares the images of a group, the sample pictures are one group, `alone` is a group alone,
and a pair is ordered beside the ordering's other pictures. A reward on videos is given the sample pictures in motion.
Legend: `N` samples.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewards.base import Metadata, RewardError
from rewards.frames import MIDDLE
from rewards.registry import resolve
from rewards.reward import Reward
from rewards.tools.samples import METADATA, ORDERINGS, PROMPT, PROMPTS, Ordering, sample, shot

NAMES = ("cat", "coffee", "noise", "cat_blurred", "text", "circle", "red", "cat_mirrored")
BATCH_TOLERANCE = 1e-3
PRECISION_TOLERANCE = 0.02
GRADIENT_TOLERANCE = 0.1
STEPS = (1.0, 0.3, 0.1, 0.03, 0.01)
_SPEED_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: Its name, see the module docstring.
        passed: Whether it holds; None when it does not apply.
        detail: What was measured.
    """

    check: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found about a reward.

    Attributes:
        name: Of the reward.
        findings: One for each check, empty when it could not be made.
        images_per_second: In batches of 8 pictures of 128 x 128.
        unavailable: Why it could not be made; empty otherwise.
        failure: The error it raised on a sample picture; empty otherwise.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    images_per_second: float = 0.0
    unavailable: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether no check failed and nothing was raised."""
        return not self.failure and all(finding.passed is not False for finding in self.findings)


def selftest(
    name: str,
    *,
    options: Mapping[str, object] | None = None,
    device: torch.device | str = "cpu",
    prompt: str | None = None,
) -> Report:
    """Makes a reward and checks it.

    Args:
        name: Any name `rewards.resolve` understands.
        options: Keyword arguments for a reward class.
        device: Where a reward with weights puts them.
        prompt: Of the sample pictures; one that suits the built-in rewards when None.

    Returns:
        The findings, or why the reward cannot be made or called.
    """
    try:
        reward = resolve(name, device=device, options=options)
    except (ImportError, ValueError) as error:
        return Report(name=name, unavailable=str(error))
    try:
        return check(reward, prompt=prompt)
    except RewardError as error:
        return Report(name=reward.name, failure=str(error))


def check(reward: Reward, *, prompt: str | None = None, orderings: Sequence[Ordering] | None = None) -> Report:
    """Checks a reward that is already made.

    Args:
        reward: The reward.
        prompt: Of the sample pictures.
        orderings: Pairs with a known order; those of the built-in rewards by name when None.

    Raises:
        RewardError: The reward fails on a sample picture.
    """
    text = prompt or PROMPTS.get(reward.name, PROMPT)
    pictures = torch.cat([_sample(reward, name) for name in NAMES])
    prompts = [text] * len(NAMES)
    scores = _score(reward, pictures, prompts)
    unit = max(float(scores.max() - scores.min()), 1e-12)
    known = ORDERINGS.get(reward.name, ()) if orderings is None else orderings
    findings = (
        _varied(scores),
        _order(reward, known),
        _batch(reward, pictures, prompts, scores, unit),
        _repeat(reward, pictures, prompts, scores),
        _precision(reward, pictures, prompts, unit),
        _range(reward, scores),
        _gradient(reward, *((pictures, prompts) if reward.groupwise else (pictures[:1], prompts[:1]))),
    )
    return Report(name=reward.name, findings=findings, images_per_second=_speed(reward, pictures, prompts))


def _sample(reward: Reward, name: str) -> Tensor:
    """A picture, or for a reward on videos a shot of it."""
    return sample(name) if reward.frames == MIDDLE else shot(name)


def _score(reward: Reward, pictures: Tensor, prompts: list[str]) -> Tensor:
    return reward(pictures, prompts, _metadata(reward, len(prompts))).total


def _metadata(reward: Reward, count: int) -> list[Metadata]:
    return [METADATA.get(reward.name, {})] * count


def _varied(scores: Tensor) -> Finding:
    low, high = float(scores.min()), float(scores.max())
    is_varied = high - low > 1e-6 * max(1.0, abs(high))
    detail = f"{low:.4g} to {high:.4g}" if is_varied else f"constant {low:.6g} for all {len(scores)} samples"
    return Finding(check="varied", passed=is_varied, detail=detail)


def _order(reward: Reward, orderings: Sequence[Ordering]) -> Finding:
    if not orderings:
        return Finding(check="order", passed=None, detail="none known")
    wrong = []
    for pair in orderings:
        if reward.groupwise:
            names = (pair.better, pair.worse, *pair.others)
            together = _score(reward, torch.cat([_sample(reward, name) for name in names]), [pair.prompt] * len(names))
            better, worse = together[:2].tolist()
        else:
            better, worse = (
                _score(reward, _sample(reward, name), [pair.prompt]).item() for name in (pair.better, pair.worse)
            )
        if not better > worse:
            wrong.append(f"{pair.better} {better:.4g} <= {pair.worse} {worse:.4g} for {pair.prompt!r}")
    detail = "; ".join(wrong) or f"{len(orderings)} of {len(orderings)}"
    return Finding(check="order", passed=not wrong, detail=detail)


def _batch(reward: Reward, pictures: Tensor, prompts: list[str], scores: Tensor, unit: float) -> Finding:
    if reward.groupwise:
        joined = reward(
            torch.cat([pictures, pictures]), prompts * 2, _metadata(reward, 2 * len(prompts)), _two_groups(len(prompts))
        )
        error = float((joined.total - scores.repeat(2)).abs().max()) / unit
        return Finding(check="batch", passed=error <= BATCH_TOLERANCE, detail=f"{error:.0e}")
    alone = [_score(reward, picture[None], [text]) for picture, text in zip(pictures, prompts, strict=True)]
    error = float((torch.cat(alone) - scores).abs().max()) / unit
    return Finding(check="batch", passed=error <= BATCH_TOLERANCE, detail=f"{error:.0e}")


def _two_groups(size: int) -> list[int]:
    return [0] * size + [1] * size


def _repeat(reward: Reward, pictures: Tensor, prompts: list[str], scores: Tensor) -> Finding:
    _ = torch.rand(1), np.random.random(), random.random()  # noqa: NPY002  a call finds these as they were otherwise
    again = _score(reward, pictures, prompts)
    difference = float((again - scores).abs().max())
    return Finding(check="repeat", passed=torch.equal(again, scores), detail=f"{difference:.0e}")


def _precision(reward: Reward, pictures: Tensor, prompts: list[str], unit: float) -> Finding:
    rounded = pictures.half()
    same = _score(reward, rounded.float(), prompts)
    errors = [float((_score(reward, rounded.to(kind), prompts) - same).abs().max()) / unit for kind in _KINDS]
    return Finding(check="precision", passed=max(errors) <= PRECISION_TOLERANCE, detail=f"{max(errors):.0e}")


_KINDS = (torch.float16, torch.float64)


def _range(reward: Reward, scores: Tensor) -> Finding:
    if reward.range is None:
        return Finding(check="range", passed=None, detail="not stated")
    low, high = reward.range
    slack = 1e-5 * max(1.0, float(scores.abs().max()))
    inside = low - slack <= float(scores.min()) and float(scores.max()) <= high + slack
    detail = "" if inside else f"{float(scores.min()):.4g} to {float(scores.max()):.4g} leaves [{low:g}, {high:g}]"
    return Finding(check="range", passed=inside, detail=detail)


def _gradient(reward: Reward, picture: Tensor, prompts: list[str]) -> Finding:
    if not reward.differentiable:
        return Finding(check="gradient", passed=None, detail="not declared")
    pixels = (0.1 + 0.8 * picture).requires_grad_()  # room to both sides
    total = reward(pixels, prompts, _metadata(reward, len(prompts)), gradient=True).total.sum()
    gradient = torch.autograd.grad(total, pixels)[0]
    slope = float(gradient.double().norm())
    if not 0 < slope < float("inf"):
        return Finding(check="gradient", passed=False, detail=f"its length is {slope:g}")
    direction = gradient / slope
    ratios = [_slope(reward, pixels.detach(), prompts, direction, step) / slope for step in STEPS]
    error = min(abs(ratio - 1) for ratio in ratios)
    passed = error <= GRADIENT_TOLERANCE or min(ratios) < 1 < max(ratios)
    return Finding(check="gradient", passed=passed, detail=f"{error:.0e}")


def _slope(reward: Reward, pixels: Tensor, prompts: list[str], direction: Tensor, step: float) -> float:
    up, down = ((pixels + sign * step * direction).clamp(0, 1) for sign in (1, -1))
    return (_score(reward, up, prompts).double() - _score(reward, down, prompts).double()).sum().item() / (2 * step)


def _speed(reward: Reward, pictures: Tensor, prompts: list[str]) -> float:
    batch = pictures[torch.arange(_SPEED_IMAGES) % len(pictures)]
    texts = [prompts[0]] * len(batch)
    start = time.perf_counter()
    _score(reward, batch, texts)
    return len(batch) / (time.perf_counter() - start)
