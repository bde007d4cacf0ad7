"""How an epoch is cut into device batches, micro-batches and optimizer steps, and what it costs.

The user says what an update means, over all processes: samples per epoch, images per prompt, updates per epoch. The
devices' batch sizes only cut the work and never change a result. What a sample's work is, the objective demands
(`ddpo.objectives.base.Demand`). Legend: `N` samples per epoch, `P` processes, `W` units of work of a sample that a pass
trains (stochastic steps, noises, chains), `U` updates per pass.

    a process samples N / P images, rounded down or up: scores are gathered, so a group may lie on two processes
    update u trains share_u of every sample's W units, sum_u share_u = W, shares differ by at most 1
    it is accumulated over ceil(N / P * share_u / train_batch_size) micro-batches per process

All processes go through the same number of batches, so that they can agree between any two to stop; where one has an
image less, its last batch is smaller, or empty. A split network (`distributed.strategy`) computes with all processes at
once: then no batch may be empty. A denoiser row is one latent through the network; guidance doubles rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpo.objectives import Demand
from ddpo.path_kl import SHARE, count_sites
from ddpo.sampling.samplers import FLOW_ONLY, SamplerConfig
from ddpo.sampling.step_selection import StepSelection
from ddpo.validation import UserError
from trainers.config import Config
from trainers.config.optimizer import PROBES
from trainers.parallel.shares import in_step, share, split_evenly
from trainers.planning.architectures import stacks_guidance


class PlanError(UserError):
    """The numbers of a configuration do not fit together; the message names possible ones."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The work of one epoch. Tuples have one entry per batch or per update of a pass.

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
        unit: What a unit of work is, for people.
        units_offered: Units that a sample has.
        units_per_sample: Those of them that a pass trains.
        shares: Units of every sample that each update takes.
        train_batch_size: Largest number of units per micro-batch.
        units_per_update: Units of each update, in this process.
        micro_batches: Units of each micro-batch of each update, in this process.
        updates_per_pass: Optimizer steps per pass.
        passes: Passes over an epoch's samples.
        optimizer_steps_per_epoch: Optimizer steps per epoch.
        optimizer_steps_total: Optimizer steps of the run.
        sampling_rows: Denoiser rows for sampling per epoch, over all processes.
        training_rows: Denoiser rows with backward pass per epoch, over all processes.
        reference_rows: Rows of other weights than the trained ones per epoch, over all processes: of the pretrained
            denoiser for the KL, at every trained step when it has a weight (but for `keeps_reference`), and at every
            sampled decision where that needs it, else at 3% of the sampled steps; and of what an objective's losses ask
            frozen weights besides.
        frozen_passes: Passes of frozen weights that each training row takes besides.
        keeps_reference: Whether what the pretrained network says in sampling is kept for training.
        steps_known: Whether the stochastic steps, and what follows from their number, are exact; else upper bounds.
        rows_known: Whether the rows are exact; else upper bounds.
        critic_states: States that a critic is asked about and fitted to per epoch, over all processes; 0 without one.
        critic_updates: Its optimizer steps per epoch.
        denoising_rows: Denoiser rows with backward pass per epoch, over all processes, of the denoising loss on what
            the model at the start could make; 0 without it.
        start_rows: Denoiser rows once, over all processes: samples of the model at the start, and its Fisher
            information.
        curvature_rows: Denoiser rows per epoch, over all processes, at most, of a trust region: with a backward pass of
            its Fisher products, without one of its looks at how far a step has moved the policy; 0 without one.
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
    unit: str
    units_offered: int
    units_per_sample: int
    shares: tuple[int, ...]
    train_batch_size: int
    units_per_update: tuple[int, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    updates_per_pass: int
    passes: int
    optimizer_steps_per_epoch: int
    optimizer_steps_total: int
    sampling_rows: int
    training_rows: int
    reference_rows: int
    frozen_passes: int
    keeps_reference: bool = False
    steps_known: bool = True
    rows_known: bool = True
    critic_states: int = 0
    critic_updates: int = 0
    denoising_rows: int = 0
    start_rows: int = 0
    curvature_rows: int = 0

    @property
    def micro_batches_per_update(self) -> tuple[int, ...]:
        """Forward and backward passes of each update."""
        return tuple(map(len, self.micro_batches))

    @property
    def whole_groups(self) -> bool:
        """Whether every group lies on a single process."""
        return self.group_size == 1 or self.groups_per_epoch % self.num_processes == 0

    def _sampling(self, each: str) -> str:
        batches = f"batches{each}: {_runs(self.sample_batches)} images"
        return (
            f"{self.num_steps} steps; {batches}"
            if self.sampling_rows
            else f"none, judged images are encoded; {batches}"
        )

    @property
    def denoiser_rows_per_epoch(self) -> int:
        """All rows through the network per epoch, over all processes."""
        own = self.sampling_rows + self.training_rows + self.reference_rows
        return own + self.curvature_rows + self.denoising_rows

    def _critic(self) -> list[tuple[str, str]]:
        """A row of the table, where there is a critic."""
        if not self.critic_states:
            return []
        asked, fitted = self.images_per_epoch * self.num_steps, self.images_per_epoch
        text = f"{asked:,} states valued, {_count(self.critic_updates, 'update')} of {_count(fitted, 'state')}"
        return [("critic", f"{self.critic_states:,} states per epoch = {text}")]

    def _once(self) -> list[tuple[str, str]]:
        """A row of the table, where something is made before the first epoch."""
        if not self.start_rows:
            return []
        return [("", f"and {self.start_rows:,} once, before the first epoch, for what holds the weights to the start")]

    def describe(self, *, shown: "BatchPlan | None" = None) -> str:
        """A table for people, without a final newline.

        Args:
            shown: A plan that was shown before; only rows that differ from its own are then told. None for all rows.
        """
        known = set() if shown is None else set(shown._rows())
        return "\n".join(f"{name:<14}{text}" for name, text in self._rows() if (name, text) not in known)

    def _rows(self) -> list[tuple[str, str]]:
        each = " per process" if self.num_processes > 1 else ""
        uneven = self.images_per_epoch % self.num_processes != 0
        rest = "; some have an image less" if uneven else "" if self.whole_groups else "; groups lie on two processes"
        shares = _runs(self.shares)
        steps_bound, rows_bound = ("" if known else "up to " for known in (self.steps_known, self.rows_known))
        return [
            ("processes", f"{self.num_processes}{rest}"),
            ("epoch", f"{self.images_per_epoch:,} images = {self.groups_per_epoch:,} prompts x {self.group_size}"),
            ("sampling", self._sampling(each)),
            (
                "training",
                f"{steps_bound}{self.units_per_sample} of {_count(self.units_offered, self.unit)} per image; "
                f"{_count(self.updates_per_pass, 'update')} x {_count(self.passes, 'inner epoch')}, "
                f"per image and update: {shares}",
            ),
            ("an update", f"{_runs(self.units_per_update)} {self.unit}s{each}"),
            ("", f"in {_runs(self.micro_batches_per_update)} micro-batches of {self.train_batch_size}{each}"),
            (
                "denoiser rows",
                f"{rows_bound}{self.denoiser_rows_per_epoch:,} per epoch = {self.sampling_rows:,} sampling"
                f" + {self.training_rows:,} training + {self.reference_rows:,} reference"
                + (f" + {self.denoising_rows:,} denoising" if self.denoising_rows else "")
                + (f" + up to {self.curvature_rows:,} Fisher products and steps tried" if self.curvature_rows else ""),
            ),
            *self._once(),
            *self._critic(),
            (
                "run",
                f"{_count(self.epochs, 'epoch')}, {self.optimizer_steps_total:,} optimizer steps, "
                f"{self.epochs * self.images_per_epoch:,} images"
                + ("" if self.max_minutes is None else f", or {self.max_minutes:g} minutes of training"),
            ),
        ]


def expected_plan(config: Config, *, num_processes: int, rank: int | None = None) -> BatchPlan:
    """The plan before the pipeline is loaded; where only that will tell, it has upper bounds and says so.

    Raises:
        PlanError: As of `make_plan`.
    """
    stacked = stacks_guidance(config.model.described)
    guided = config.sampler.guidance_scale > 1
    plan = make_plan(
        config,
        num_processes=num_processes,
        num_stochastic=config.sampler.max_stochastic_steps,
        branches=2 if guided and stacked is not False else 1,
        rank=rank,
    )
    demand = config.demand
    fewer = max(0, plan.num_stochastic - 1)
    same_work = demand.trained_units(fewer) == plan.units_per_sample
    certain = _has_certain_steps(config.sampler)
    steps_known = certain or (same_work and not demand.needs_noise)
    return replace(
        plan, steps_known=steps_known, rows_known=certain and plan.rows_known and not (guided and stacked is None)
    )


def _has_certain_steps(sampler: SamplerConfig) -> bool:
    """Whether `max_stochastic_steps` is exact: whether a model's last DDIM step has noise shows in its schedule."""
    if sampler.is_noise_free:
        return True
    steps = range(sampler.num_steps)
    last_counts = steps[-1] in sampler.stochastic_steps.candidates(steps, len(steps))
    return sampler.kind in FLOW_ONLY or sampler.ends_noisy or sampler.stochastic_steps.kind != "all" or not last_counts


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
        PlanError: A number does not divide; the message names the nearest possible values.
    """
    batch, demand = config.batch, config.demand
    _check_samples(config, num_processes)
    rank = num_processes - 1 if rank is None else rank
    samples = len(share(batch.samples_per_epoch, rank=rank, count=num_processes))
    most = math.ceil(batch.samples_per_epoch / num_processes)
    units = demand.trained_units(num_stochastic)
    _check_updates(demand, units, num_stochastic)
    shares = split_evenly(units, demand.updates)
    sharded = num_processes > 1 and config.distributed.strategy != "ddp"
    if branches is None:
        branches = 2 if config.sampler.guidance_scale > 1 else 1
    trained_branches = branches if demand.guidance else 1
    calls = demand.graph_steps(config.sampler.num_steps) if demand.chain else 1
    beyond = config.sampler.steps_from_first_unseen(num_stochastic) - 1 if demand.chain_unit else 0
    per_sample = (units * calls * demand.rows + beyond) * trained_branches
    training_rows = batch.samples_per_epoch * demand.passes * per_sample
    contests = demand.contended(num_stochastic) * demand.contenders
    states = config.sampler.num_steps + len(config.shaping.steps) + contests
    steered = 1 if config.steer is None else config.steer.passes
    sample_batches = in_step(samples, batch.sample_batch_size, most=most, sharded=sharded)
    micro_batches = tuple(
        in_step(samples * part, batch.train_batch_size, most=most * part, sharded=sharded) for part in shares
    )
    same_everywhere = batch.samples_per_epoch % num_processes == 0
    alike = same_everywhere and len({*sample_batches, *(size for sizes in micro_batches for size in sizes)}) == 1
    keeps_reference = alike and _finds_reference_anew(config)
    frozen_passes = config.frozen_passes - keeps_reference
    reference_rows = _sampled_reference_rows(config, num_stochastic, branches=trained_branches)
    return BatchPlan(
        num_processes=num_processes,
        rank=rank,
        epochs=config.epochs,
        max_minutes=config.max_minutes,
        images_per_epoch=batch.samples_per_epoch,
        group_size=batch.group_size,
        groups_per_epoch=batch.samples_per_epoch // batch.group_size,
        samples_per_process=samples,
        sample_batches=sample_batches,
        num_steps=config.sampler.num_steps,
        num_stochastic=num_stochastic,
        branches=branches,
        unit=demand.unit,
        units_offered=demand.units(num_stochastic),
        units_per_sample=units,
        shares=shares,
        train_batch_size=batch.train_batch_size,
        units_per_update=tuple(samples * part for part in shares),
        micro_batches=micro_batches,
        updates_per_pass=demand.updates,
        passes=demand.passes,
        optimizer_steps_per_epoch=demand.updates * demand.passes,
        optimizer_steps_total=demand.updates * demand.passes * config.epochs,
        sampling_rows=0 if config.offline else batch.samples_per_epoch * states * steered * branches,
        training_rows=training_rows,
        reference_rows=reference_rows + training_rows * frozen_passes,
        frozen_passes=frozen_passes,
        keeps_reference=keeps_reference,
        rows_known=not demand.varies and config.steer is None and (config.weighs_kl or not demand.spares),
        critic_states=critic_states(config),
        critic_updates=config.critic.updates_per_epoch if config.critic.is_on else 0,
        denoising_rows=demand.updates * demand.passes * _denoising_batch(config),
        start_rows=config.regularization.own_samples * config.sampler.num_steps + config.regularization.fisher_rows,
        curvature_rows=_curvature_rows(config, shares, branches=trained_branches),
    )


def _curvature_rows(config: Config, shares: Sequence[int], *, branches: int) -> int:
    """At most: a product an iteration and one or two besides, the diagonal's probes, and a pass a step that is tried.

    Where the KL has a weight, what a step is worth takes a row of the pretrained network too.
    """
    if not config.optimizer.is_trust_region:
        return 0
    region = config.optimizer.region
    units = sum(-(-config.batch.samples_per_epoch * part // region.stride) for part in shares)
    products = region.cg_iterations + (1 + PROBES if region.diagonal else 2)
    looks = 2 + region.backtracks  # before the step, the whole step, shorter ones
    rows = products + looks * (2 if config.weighs_kl else 1)
    return units * config.demand.passes * rows * branches


def _denoising_batch(config: Config) -> int:
    options = config.regularization.denoising
    return options.batch_size if options.strength else 0


def critic_states(config: Config) -> int:
    """States through a critic per epoch: each of the samples' once before it learns, and those it is fitted to."""
    critic = config.critic
    each = config.sampler.num_steps + critic.updates_per_epoch if critic.is_on else 0
    return config.batch.samples_per_epoch * each


def check_judged(plan: BatchPlan, images: int) -> None:
    """Refuses groups that are not the entries of judged images.

    Args:
        plan: The epoch.
        images: Of an entry, 2 for pairs.
    """
    if plan.group_size != images:
        kind = "pairs" if images == 2 else "single images"
        raise PlanError(f"batch.group_size must be {images} with offline ({kind}), got {plan.group_size}")


def check_whole_groups(plan: BatchPlan, *, who: str = "a reward", alone: bool = False) -> None:
    """Refuses a plan that leaves a group on two processes: what compares images needs the whole group at once.

    Args:
        plan: The epoch.
        who: What compares them, for people.
        alone: Whether a single group will do, as it does where no other groups are a baseline.

    Raises:
        PlanError: A group would lie on two processes; the message names the nearest possible `samples_per_epoch`.
    """
    if plan.groups_per_epoch < 2 and not alone:
        raise PlanError(
            f"batch.samples_per_epoch must be at least {2 * plan.group_size} (two groups of batch.group_size): the "
            f"other groups are the baseline of a reward that compares images; got {plan.images_per_epoch}"
        )
    if plan.whole_groups:
        return
    unit = plan.group_size * plan.num_processes
    below = plan.images_per_epoch // unit * unit
    nearest = " or ".join(str(size) for size in (below, below + unit) if size)
    raise PlanError(
        f"batch.samples_per_epoch must be a multiple of {unit} ({plan.num_processes} processes x {plan.group_size}, "
        f"batch.group_size) with {who} that compares the images of a group, so that every process has whole groups; "
        f"got {plan.images_per_epoch}, nearest possible: {nearest}"
    )


def _finds_reference_anew(config: Config) -> bool:
    """Whether training would find bit for bit what the pretrained network has said in sampling.

    So it is in float32 and uncompiled, in calls of as many rows; other calls round in other ways, and the KL of
    untrained weights would no longer be exactly 0.
    """
    exact = config.model.precision == "fp32" and not config.model.compile
    return exact and config.measures_kl and config.demand.reference_means and config.steer is None


def _sampled_reference_rows(config: Config, num_stochastic: int, *, branches: int) -> int:
    """Those of every sampled decision where all are measured, else of a few sites; and those that prepare an epoch.

    Steps that epochs leave to the ODE have a few sites too, or all where something follows the KL; their KL with full
    noise takes two rows each. Steered samples have none.
    """
    samples, sampler = config.batch.samples_per_epoch, config.sampler
    if config.offline:
        return 0
    hidden, share = steps_outside_windows(config, num_stochastic), 1.0 if config.follows_kl else SHARE
    full_noise = (
        2 * count_sites(samples, num_steps=sampler.num_steps, num_stochastic=hidden, share=share) if hidden else 0
    )
    prepare = config.demand.prepare
    preparing = 0 if prepare is None else samples * prepare.rows(sampler.num_steps) * branches
    if config.steer is not None:
        return preparing
    if config.measures_kl:
        return (samples * num_stochastic + full_noise) * branches + preparing
    own = count_sites(samples, num_steps=sampler.num_steps, num_stochastic=num_stochastic)
    return (own + full_noise) * branches + preparing


def steps_outside_windows(config: Config, num_stochastic: int) -> int:
    """How many steps an epoch leaves to the ODE that have noise under the sampler's full noise."""
    everything = replace(config.sampler, stochastic_steps=StepSelection()).max_stochastic_steps
    return everything - num_stochastic if config.sampler.stochastic_steps != StepSelection() else 0


def _check_updates(demand: Demand, units: int, num_stochastic: int) -> None:
    """Something for every update."""
    if demand.updates > units:
        raise PlanError(
            f"objective.updates_per_epoch must be at most {units}, got {demand.updates}: each update takes its own "
            f"share of the {units} trained per image ({demand.fraction:g} of "
            f"{_count(demand.units(num_stochastic), demand.unit)}); for more updates raise inner_epochs"
        )


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
