"""The course of the learning rate over a run: a warm-up, then constant, linear, or half a cosine.

    factor = final + (1 - final) shape(done),    done = max( share of the schedule's updates, of the run's minutes )

The schedule is as long as the run (`epochs`), or `schedule_epochs`; where time ends the run first (`max_minutes`), it
falls with the time. A run that is resumed with more epochs gets a longer schedule and so goes back up; one with
`schedule_epochs` keeps its course.
"""

import math
from collections.abc import Callable

from trainers.config import Config
from trainers.config.groups import OptimizerConfig

Elapsed = Callable[[], float]
"""The share of the run's minutes that is used up, the same on every process; 0 without a limit."""


def rate_factor(
    update_index: int, schedule: str, warmup: int, total: int, *, elapsed: float = 0.0, final: float = 0.0
) -> float:
    """An update's learning rate over its peak.

    Args:
        update_index: From 0.
        schedule: `constant`, `linear` or `cosine`.
        warmup: Updates over which the rate rises linearly.
        total: Updates of the schedule, the warm-up included.
        elapsed: Share of the run's minutes that is used up, in [0, 1].
        final: Where the schedule ends.
    """
    if update_index < warmup:
        return (update_index + 1) / warmup
    done = min(1.0, max((update_index - warmup) / max(1, total - warmup), elapsed))
    match schedule:
        case "linear":
            return final + (1 - final) * (1.0 - done)
        case "cosine":
            return final + (1 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def factor_of(options: OptimizerConfig, update_index: int, total: int, *, elapsed: float = 0.0) -> float:
    """`rate_factor` of a configuration."""
    warmup, final = options.warmup_updates, options.final_rate
    return rate_factor(update_index, options.schedule, warmup, total, elapsed=elapsed, final=final)


def schedule_updates(config: Config, updates_per_epoch: int) -> int:
    """Optimizer steps of the schedule."""
    return updates_per_epoch * (config.optimizer.schedule_epochs or config.epochs)


def schedule_notice(saved: Config, config: Config, *, update_index: int, updates_per_epoch: int) -> str | None:
    """What a resumed run should be told of its learning rate, whose schedule has another length now; None for nothing.

    Args:
        saved: What the run had.
        config: What it has now.
        update_index: Of the next update.
        updates_per_epoch: Optimizer steps of an epoch.
    """
    was, now = (schedule_updates(one, updates_per_epoch) for one in (saved, config))
    before, after = (factor_of(config.optimizer, update_index, total) for total in (was, now))
    if math.isclose(before, after):
        return None
    return (
        f"the learning rate's schedule ({config.optimizer.schedule}) is now {now // updates_per_epoch} epochs long, "
        f"not {was // updates_per_epoch}: the rate goes from {before:.3g} to {after:.3g} of its peak here; "
        f"--optimizer.schedule_epochs {was // updates_per_epoch} keeps its course"
    )
