"""Step rules: from an update's gradients to new weights.

A rule is given the learners and the update, and may go through the update's micro-batches as often as it likes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ddpo.validation import UserError
from trainers.config.groups import OptimizerConfig
from trainers.epoch.learner import POLICY, Learner
from trainers.epoch.learning_rate import Elapsed, factor_of
from trainers.parallel.sharding import norm_of
from trainers.tracking.metrics import Means

MAX_SKIPPED_IN_A_ROW = 3


class DivergedError(UserError):
    """Gradients stay non-finite."""


class Update(Protocol):
    """The micro-batches of one update over all processes; may be gone through again."""

    def accumulate(self) -> Means:
        """Adds up the gradients of all micro-batches, of all processes, in `.grad`; returns what they measured."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step of a learner.

    Attributes:
        grad_norm: Before clipping; None if the step was skipped for it.
        learning_rate: Of the step; of a trust region the multiple of the direction that was taken.
        measured: What else the rule has measured, by name.
    """

    grad_norm: float | None
    learning_rate: float
    measured: Mapping[str, float] = field(default_factory=dict)


StepRule = Callable[[Sequence[Learner], Update], dict[str, StepReport]]
"""Takes one step of every learner; its report by the learner's name."""


def adamw(options: OptimizerConfig, *, scaler: torch.amp.GradScaler, total: int, elapsed: Elapsed) -> StepRule:
    """One step down the clipped gradient of each learner by its optimizer; non-finite gradients are skipped.

    Args:
        options: Course of the learning rate, and where gradients are clipped.
        scaler: Of the losses, in fp16.
        total: Optimizer steps of the schedule.
        elapsed: How much of the run's time is used up.
    """

    def step(learners: Sequence[Learner], update: Update) -> dict[str, StepReport]:
        update.accumulate()
        used = elapsed()
        factors = [factor_of(options, learner.counts.updates, total, elapsed=used) for learner in learners]
        reports = {
            learner.name: _step(learner, factor, options, scaler)
            for learner, factor in zip(learners, factors, strict=True)
        }
        scaler.update()
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
            group = "optimizer" if learner.name == POLICY else learner.name
            check_progress(learner, cure=f"lower {group}.learning_rate, or use model.precision: fp32 or bf16")
        return reports

    return step


def _step(learner: Learner, factor: float, options: OptimizerConfig, scaler: torch.amp.GradScaler) -> StepReport:
    """Clips the gradient and steps, or skips a non-finite one."""
    counts, optimizer = learner.counts, learner.optimizer
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * factor
    scaler.unscale_(optimizer)
    norm = norm_of(torch.nn.utils.clip_grad_norm_(learner.parameters.values(), options.max_grad_norm))
    finite = norm < float("inf")
    if finite:
        scaler.step(optimizer)
        learner.update_averages(after="step")
    counts.updates += 1
    counts.skipped += not finite
    counts.skipped_in_a_row = 0 if finite else counts.skipped_in_a_row + 1
    return StepReport(grad_norm=norm if finite else None, learning_rate=optimizer.param_groups[0]["lr"])


def check_progress(learner: Learner, *, cure: str) -> None:
    """Ends a run whose gradients stay non-finite, with a word on what to do.

    Raises:
        DivergedError: The third skip in a row.
    """
    if learner.counts.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} updates in a row (up to update "
            f"{learner.counts.updates}); {cure}"
        )
