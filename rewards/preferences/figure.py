"""The plot of a fitted reward: how it learnt, whether its confidence is right, whether its doubt is."""

from __future__ import annotations

from pathlib import Path

import torch

from rewards.preferences.fit import Fit

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#999999"
_GROUPS = 5


def draw(fitted: Fit, path: Path) -> None:
    """Writes a PNG: validation loss by epoch, reliability diagram, accuracy by disagreement of the members."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    losses, reliability, doubt = figure.subplots(1, 3)
    for course in fitted.losses:
        losses.plot(range(1, len(course) + 1), course, "-o", color=_BLUE, markersize=3, alpha=0.7)
    losses.axhline(0.6931, color=_GREY, linestyle=":", label="knows nothing")
    losses.set(title="validation, a line a member", xlabel="epoch", ylabel="nats a pair")

    bins = fitted.heldout.bins
    reliability.plot([0.5, 1], [0.5, 1], color=_GREY, linestyle=":", label="calibrated")
    sizes = [10 + 300 * entry.count / fitted.heldout.num_pairs for entry in bins]
    reliability.scatter([b.confidence for b in bins], [b.accuracy for b in bins], s=sizes, color=_ORANGE, zorder=3)
    reliability.set(
        title=f"held-out reliability, ECE {fitted.heldout.ece:.3f} (floor {fitted.heldout.ece_floor:.3f})",
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0.48, 1.02),
        ylim=(min([0.38, *[b.accuracy - 0.05 for b in bins]]), 1.02),
    )

    centres, accuracies = _by_disagreement(fitted)
    doubt.plot(centres, accuracies, "-o", color=_ORANGE, markersize=4)
    doubt.set(title="held-out accuracy by disagreement", xlabel="std of P(a > b) over members", ylabel="accuracy")
    for axes in (losses, reliability, doubt):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in (losses, reliability):
        axes.legend(frameon=False)
    figure.savefig(path)


def _by_disagreement(fitted: Fit) -> tuple[list[float], list[float]]:
    """Mean spread and accuracy of held-out pairs in groups of equal size, by rising disagreement."""
    decided = fitted.labels != 0.5
    right = ((fitted.difference > 0) == (fitted.labels > 0.5))[decided].float()
    doubt = fitted.disagreement[decided]
    order = torch.argsort(doubt)
    groups = [group for group in order.tensor_split(_GROUPS) if len(group)]
    return [float(doubt[group].mean()) for group in groups], [float(right[group].mean()) for group in groups]
