"""How an epoch is cut into device batches, micro-batches and optimizer steps, and what it costs.

The user says what an update means, over all processes: samples per epoch, images per prompt, updates per epoch. The
devices' batch sizes only cut the work and never change a result. Legend: `N` samples per epoch, `P` processes, `S`
stochastic steps, `S' = round(step_fraction S)` steps trained per sample and inner epoch, `U` updates per inner epoch.

    a process samples N / P images, rounded down or up: scores are gathered, so a group may lie on two processes
    update u trains share_u of every sample's S' steps, sum_u share_u = S', shares differ by at most 1
    it is accumulated over ceil(N / P * share_u / train_batch_size) micro-batches per process

All processes go through the same number of batches, so that they can agree between any two to stop; where one has an
image less, its last batch is smaller, or empty. A split network (`distributed.strategy`) computes with all processes at
once: then no batch may be empty. A denoiser row is one latent through the network; guidance doubles rows.
"""

import math
from dataclasses import dataclass, replace

from ddpo.samplers import FLOW_ONLY, SamplerConfig
from trainers.config import Config
from trainers.estimate.architectures import stacks_guidance

KL_SAMPLES = 16  # over all processes, on which the KL is measured when it has no weight


class PlanError(ValueError):
    """The numbers of a configuration do not fit together; the message names possible ones."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The work of one epoch. Tuples have one entry per batch or per update of an inner epoch.

    Attributes:
        num_processes: Processes that share an epoch.
        rank: The process that this is the plan of; the others' differ by one sample where N / P is no whole number.
        epochs: Epochs of the run.
        max_minutes: Of training, after which the run ends sooner; None for no limit.
        images_per_epoch: Samples over all processes.
        group_size: Samples per prompt.
        groups_per_epoch: Prompts drawn per epoch over all processes.
        samples_per_process: Samples of this process.
        sample_batches: Images of each denoiser batch while sampling, in this process.
        num_steps: Denoising steps of a sample.
        num_stochastic: Those with noise: the policy's decisions.
        branches: Denoiser rows of a latent with guidance, 1 or 2.
        steps_per_sample: Steps trained per sample and inner epoch.
        shares: Steps of every sample that each update takes.
        train_batch_size: Largest number of transitions per micro-batch.
        transitions_per_update: Transitions of each update, in this process.
        micro_batches: Transitions of each micro-batch of each update, in this process.
        updates_per_epoch: Optimizer steps per inner epoch.
        inner_epochs: Passes over an epoch's samples.
        optimizer_steps_per_epoch: Optimizer steps per epoch.
        optimizer_steps_total: Optimizer steps of the run.
        sampling_rows: Denoiser rows for sampling per epoch, over all processes.
        training_rows: Denoiser rows with backward pass per epoch, over all processes.
        reference_rows: Rows for the KL per epoch, over all processes: of the pretrained denoiser at every sampled step
            and trained transition when the KL has a weight, of both denoisers on a few samples when it has none.
        steps_known: Whether the stochastic steps, and what follows from their number, are exact; else upper bounds.
        rows_known: Whether the rows are exact; else upper bounds.
    """

    num_processes: int
    rank: int
    epochs: int
    max_minutes: float | None
    images_per_epoch: int
    group_size: int
    groups_per_epoch: int
    samples_per_process: int
    sample_batches: tuple[int, ...]
    num_steps: int
    num_stochastic: int
    branches: int
    steps_per_sample: int
    shares: tuple[int, ...]
    train_batch_size: int
    transitions_per_update: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    updates_per_epoch: int
    inner_epochs: int
    optimizer_steps_per_epoch: int
    optimizer_steps_total: int
    sampling_rows: int
    training_rows: int
    reference_rows: int
    steps_known: bool = True
    rows_known: bool = True

    @property
    def micro_batches_per_update(self) -> tuple[int, ...]:
        """Forward and backward passes of each update."""
        return tuple(map(len, self.micro_batches))

    @property
    def whole_groups(self) -> bool:
        """Whether every group lies on a single process."""
        return self.group_size == 1 or self.groups_per_epoch % self.num_processes == 0

    @property
    def denoiser_rows_per_epoch(self) -> int:
        """All rows through the network per epoch, over all processes."""
        return self.sampling_rows + self.training_rows + self.reference_rows

    def describe(self) -> str:
        """A table for people, without a final newline."""
        each = " per process" if self.num_processes > 1 else ""
        uneven = self.images_per_epoch % self.num_processes != 0
        rest = "; some have an image less" if uneven else "" if self.whole_groups else "; groups lie on two processes"
        shares = _runs(self.shares)
        steps_bound, rows_bound = ("" if known else "up to " for known in (self.steps_known, self.rows_known))
        rows = [
            ("processes", f"{self.num_processes}{rest}"),
            ("epoch", f"{self.images_per_epoch:,} images = {self.groups_per_epoch:,} prompts x {self.group_size}"),
            ("sampling", f"{self.num_steps} steps; batches{each}: {_runs(self.sample_batches)} images"),
            (
                "training",
                f"{steps_bound}{self.steps_per_sample} of {self.num_stochastic} stochastic steps per image; "
                f"{_count(self.updates_per_epoch, 'update')} x {_count(self.inner_epochs, 'inner epoch')}, "
                f"steps an update: {shares}",
            ),
            ("an update", f"{_runs(self.transitions_per_update)} transitions{each}"),
            ("", f"in {_runs(self.micro_batches_per_update)} micro-batches of {self.train_batch_size}{each}"),
            (
                "denoiser rows",
                f"{rows_bound}{self.denoiser_rows_per_epoch:,} per epoch = {self.sampling_rows:,} sampling"
                f" + {self.training_rows:,} training + {self.reference_rows:,} reference",
            ),
            (
                "run",
                f"{_count(self.epochs, 'epoch')}, {self.optimizer_steps_total:,} optimizer steps, "
                f"{self.epochs * self.images_per_epoch:,} images"
                + ("" if self.max_minutes is None else f", or {self.max_minutes:g} minutes of training"),
            ),
        ]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


def expected_plan(config: Config, *, num_processes: int, rank: int | None = None) -> BatchPlan:
    """The plan before the pipeline is loaded; where only that will tell, it has upper bounds and says so.

    Raises:
        PlanError: As of `make_plan`.
    """
    stacked = stacks_guidance(config.model.path)
    guided = config.sampler.guidance_scale > 1
    plan = make_plan(
        config,
        num_processes=num_processes,
        num_stochastic=config.sampler.max_stochastic_steps,
        branches=2 if guided and stacked is not False else 1,
        rank=rank,
    )
    steps_known = _has_certain_steps(config.sampler)
    return replace(plan, steps_known=steps_known, rows_known=steps_known and not (guided and stacked is None))


def _has_certain_steps(sampler: SamplerConfig) -> bool:
    """Whether `max_stochastic_steps` is exact: whether a model's last DDIM step has noise shows in its schedule."""
    steps = range(sampler.num_steps)
    last_counts = steps[-1] in sampler.stochastic_steps.candidates(steps, len(steps))
    return sampler.kind in FLOW_ONLY or sampler.stochastic_steps.kind != "all" or not last_counts


def make_plan(
    config: Config, *, num_processes: int, num_stochastic: int, branches: int | None = None, rank: int | None = None
) -> BatchPlan:
    """Plans an epoch.

    Args:
        config: The run.
        num_processes: Processes that share each epoch.
        num_stochastic: Steps with noise, the same number in every epoch, known once the schedule is.
        branches: Denoiser rows of a latent with guidance (`GuidanceRule.branches`); None takes 2 where the guidance
            scale is above 1.
        rank: The process to plan for; None takes one with the most samples.

    Raises:
        PlanError: a number does not divide; the message names the nearest possible values.
    """
    batch, objective = config.batch, config.objective
    _check_samples(config, num_processes)
    rank = num_processes - 1 if rank is None else rank
    samples = len(share(batch.samples_per_epoch, rank=rank, count=num_processes))
    most = math.ceil(batch.samples_per_epoch / num_processes)
    steps = max(1, round(objective.step_fraction * num_stochastic))
    updates = objective.updates_per_epoch
    if updates > steps:
        raise PlanError(
            f"objective.updates_per_epoch must be at most {steps}, got {updates}: each update takes its own share of "
            f"the {steps} steps trained per image (step_fraction {objective.step_fraction:g} of {num_stochastic} "
            f"stochastic steps); for more updates raise inner_epochs"
        )
    shares = split_evenly(steps, updates)
    sharded = num_processes > 1 and config.distributed.strategy != "ddp"
    if branches is None:
        branches = 2 if config.sampler.guidance_scale > 1 else 1
    trained_branches = branches if objective.train_guidance == "same" else 1
    training_rows = batch.samples_per_epoch * steps * objective.inner_epochs * trained_branches
    states = config.sampler.num_steps + len(config.shaping.steps)
    return BatchPlan(
        num_processes=num_processes,
        rank=rank,
        epochs=config.epochs,
        max_minutes=config.max_minutes,
        images_per_epoch=batch.samples_per_epoch,
        group_size=batch.group_size,
        groups_per_epoch=batch.samples_per_epoch // batch.group_size,
        samples_per_process=samples,
        sample_batches=in_step(samples, batch.sample_batch_size, most=most, sharded=sharded),
        num_steps=config.sampler.num_steps,
        num_stochastic=num_stochastic,
        branches=branches,
        steps_per_sample=steps,
        shares=shares,
        train_batch_size=batch.train_batch_size,
        transitions_per_update=tuple(samples * part for part in shares),
        micro_batches=tuple(
            in_step(samples * part, batch.train_batch_size, most=most * part, sharded=sharded) for part in shares
        ),
        updates_per_epoch=updates,
        inner_epochs=objective.inner_epochs,
        optimizer_steps_per_epoch=updates * objective.inner_epochs,
        optimizer_steps_total=updates * objective.inner_epochs * config.epochs,
        sampling_rows=batch.samples_per_epoch * states * branches,
        training_rows=training_rows,
        reference_rows=_reference_rows(config, most, num_processes, num_stochastic * trained_branches, training_rows),
    )


def check_whole_groups(plan: BatchPlan) -> None:
    """Refuses a plan that leaves a group on two processes: a reward that compares images needs the whole group at once.

    Raises:
        PlanError: the message names the nearest possible `samples_per_epoch`.
    """
    if plan.whole_groups:
        return
    unit = plan.group_size * plan.num_processes
    below = plan.images_per_epoch // unit * unit
    nearest = " or ".join(str(size) for size in (below, below + unit) if size)
    raise PlanError(
        f"batch.samples_per_epoch must be a multiple of {unit} ({plan.num_processes} processes x {plan.group_size}, "
        f"batch.group_size) with a reward that compares the images of a group, so that every process has whole groups; "
        f"got {plan.images_per_epoch}, nearest possible: {nearest}"
    )


def _reference_rows(config: Config, samples: int, num_processes: int, rows: int, training_rows: int) -> int:
    """With a KL weight the `rows` of every sample and of training; without, a few samples', twice, to report it."""
    if config.weighs_kl:
        return config.batch.samples_per_epoch * rows + training_rows
    return 2 * min(kl_samples(num_processes), samples) * num_processes * rows


def kl_samples(num_processes: int) -> int:
    """Images of a process, if it has as many, on which the KL is measured when it has no weight."""
    return -(-KL_SAMPLES // num_processes)


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """`parts` whole numbers that sum to `total` and differ by at most 1, larger ones first."""
    size, more = divmod(total, parts)
    return (size + 1,) * more + (size,) * (parts - more)


def chunks(total: int, size: int) -> tuple[int, ...]:
    """`total` cut into pieces of `size`, the last one smaller where it does not divide."""
    full, rest = divmod(total, size)
    return (size,) * full + ((rest,) if rest else ())


def share(total: int, *, rank: int, count: int) -> range:
    """A process's contiguous part of `total` items; parts differ by at most one, the last ones being larger."""
    return range(total * rank // count, total * (rank + 1) // count)


def in_step(total: int, size: int, *, most: int, sharded: bool) -> tuple[int, ...]:
    """A process's batches: as many as the process with the most items has.

    Args:
        total: Items of this process; `most` or less.
        size: Largest batch.
        most: Items of the process that has the most.
        sharded: Whether all processes must have something to do in every batch.
    """
    count = math.ceil(most / size)
    if sharded and total < most:
        return split_evenly(total, count)
    full = chunks(total, size)
    return full + (0,) * (count - len(full))


def _check_samples(config: Config, num_processes: int) -> None:
    """Whole groups, something for every process, and for a split network something in every batch."""
    batch = config.batch
    samples, group = batch.samples_per_epoch, batch.group_size
    if samples % group != 0 or samples < num_processes:
        least = math.ceil(num_processes / group) * group
        nearest = sorted({max(least, samples // group * group), max(least, (samples // group + 1) * group)})
        each = f" and at least one for each of {num_processes} processes" if num_processes > 1 else ""
        raise PlanError(
            f"batch.samples_per_epoch must be a multiple of {group} (batch.group_size){each}, got {samples}; "
            f"nearest possible: {' or '.join(map(str, nearest))}"
        )
    ones = [name for name in ("sample_batch_size", "train_batch_size") if getattr(batch, name) == 1]
    sharded = config.distributed.strategy != "ddp"
    if sharded and samples % num_processes and ones:
        raise PlanError(
            f"batch.{ones[0]} must be at least 2 with distributed.strategy {config.distributed.strategy} and "
            f"{samples} samples on {num_processes} processes, got 1: a split network computes with all processes at "
            "once, and one with an image less would have an empty batch"
        )


def _runs(numbers: tuple[int, ...]) -> str:
    """`3 x 8 + 4` for (8, 8, 8, 4)."""
    counts = {number: numbers.count(number) for number in dict.fromkeys(numbers)}
    return " + ".join(f"{count} x {number:,}" if count > 1 else f"{number:,}" for number, count in counts.items())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
