"""The last verb of an epoch: optimizer steps on its experience.

Each pass permutes every sample's units of work; update u takes its own share of them from every sample. An update is
accumulated over micro-batches of units, of any samples mixed, so that memory is bounded by `train_batch_size` alone.
Samples that the objective knows to have no gradient come last, and micro-batches of nothing else are left out: the
gradient is the same, to the order of its sum.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from ddpo.curvature import FisherProducts
from ddpo.objectives import Experience, Models, Objective
from ddpo.objectives.base import Preparation, Sparing, Surveying, trained_view
from ddpo.seeds import Purpose, one_seed, random_orders, stream
from trainers.config.groups import DistributedConfig
from trainers.epoch.curvature import Geometry, thinned
from trainers.epoch.drift import Gate
from trainers.epoch.learner import Learner
from trainers.epoch.prepare import prepared
from trainers.epoch.regularization import Regularizer, add_measured
from trainers.epoch.score_gradient import ScoreGradient
from trainers.epoch.step_rules import StepReport, StepRule
from trainers.parallel.gradients import sum_gradients
from trainers.parallel.processes import Processes
from trainers.parallel.sharding import gathered
from trainers.planning.plan import BatchPlan
from trainers.tracking.metrics import Means, StepMeans
from trainers.tracking.progress import Progress


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What the updates of an epoch measured, over all processes.

    Attributes:
        per_step: Means by name, (T,) each, NaN at steps that were not trained; of what was measured at steps.
        overall: Means by name.
        drift: mean |log-prob recomputed - sampled| of each step before the first update, (T,) nats; NaN at steps that
            this update did not train. None where nothing is recomputed.
        grad_norm: Mean gradient norm of the policy before clipping; NaN if every update was skipped.
        learning_rate: Of its last update.
        skipped: Its updates skipped for non-finite gradients.
        measured: Means over the updates of what the step rule has measured besides, by name.
    """

    per_step: dict[str, Tensor]
    overall: dict[str, float]
    drift: Tensor | None
    grad_norm: float
    learning_rate: float
    skipped: int
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Updater:
    """What the updates of every epoch of a run share.

    Attributes:
        objective: Cuts batches and yields losses.
        models: What the losses are computed with.
        score: Its rewards, told where a backward pass ends; None where it has none.
        preparation: What the objective makes of an epoch before its updates; None for nothing.
        learners: What is trained; the policy's comes first.
        rule: Steps them.
        scaler: Scale of the losses in fp16; one for all learners, as one backward pass serves them all.
        plan: Sizes of the updates.
        distributed: How the network is shared.
        gate_tolerance: Largest drift, nats per latent dimension.
        seed: Of the run.
        processes: Whose gradients are added up.
        progress: Shows the micro-batches.
        regularizer: Adds terms that hold the weights to those of the start; None for none.
        products: Of the Fisher matrix, for step rules that ask for them.
    """

    objective: Objective[Any]
    models: Models
    score: ScoreGradient | None
    preparation: Preparation | None
    learners: Sequence[Learner]
    rule: StepRule
    scaler: torch.amp.GradScaler
    plan: BatchPlan
    distributed: DistributedConfig
    gate_tolerance: float
    seed: int
    processes: Processes
    progress: Progress
    regularizer: Regularizer | None = None
    products: FisherProducts | None = None

    def __call__(self, experience: Experience, *, epoch: int) -> UpdateReport:
        """Takes an epoch's optimizer steps.

        Args:
            experience: This process's samples.
            epoch: Finished epochs.

        Raises:
            GateError: Before the first update, recomputed log-probabilities differ from the sampled ones.
            DivergedError: The third non-finite gradient in a row.
            Interrupted: A signal has reached some process; weights and optimizer are then in the middle of an epoch.
        """
        path = experience.trajectory
        policy = trained_view(self.models.policy, self.objective.demand).at(path.schedule)
        models = replace(self.models, policy=policy)
        experience = self._prepared(models, experience, epoch=epoch)
        totals = Means(path.schedule.num_steps, self.models.policy.device)
        gate = Gate(tolerance=self.gate_tolerance, dims=path.final[0].numel())
        idle, steps = self._idle(experience), list[StepReport]()
        for number in range(self.plan.passes):
            seed = one_seed(self.seed, epoch, number, purpose=Purpose.PASS)
            for work in deal(experience, self.plan, seed=seed):
                if idle is not None:
                    work = work.without(idle, self.processes)
                batches = MicroBatches(
                    updater=self, models=models, experience=experience, work=work, totals=totals, gate=gate
                )
                steps.append(self.rule(self.learners, batches)[self.learners[0].name])
        for learner in self.learners:
            learner.update_averages(after="epoch")
        return self._report(totals, gate, steps)

    def _idle(self, experience: Experience) -> Tensor | None:
        """Which samples have no gradient, (B,) bool on the CPU; None where the objective cannot tell."""
        if not self.objective.demand.spares:
            return None
        return cast("Sparing", self.objective).idle(experience).cpu()

    def _prepared(self, models: Models, experience: Experience, *, epoch: int) -> Experience:
        if self.preparation is None:
            return experience
        return prepared(
            self.preparation,
            models,
            experience,
            plan=self.plan,
            distributed=self.distributed,
            score=self.score,
            seed=self.seed,
            epoch=epoch,
            processes=self.processes,
            progress=self.progress,
        )

    def _report(self, totals: Means, gate: Gate, steps: Sequence[StepReport]) -> UpdateReport:
        per_step, overall = totals.reduce(self.processes)
        norms = [step.grad_norm for step in steps if step.grad_norm is not None]
        return UpdateReport(
            per_step={name: value.mean for name, value in per_step.items()},
            overall=overall,
            drift=gate.drift,
            grad_norm=sum(norms) / len(norms) if norms else float("nan"),
            learning_rate=steps[-1].learning_rate,
            skipped=len(steps) - len(norms),
            measured=_means([step.measured for step in steps if step.measured]),
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """The M units of an update in this process.

    Attributes:
        rows: Their samples, (M,) int64 on the CPU.
        slots: Which of a sample's units, (M,) int64 on the CPU.
        sizes: Units of each micro-batch; they sum to M.
        share: Units of each sample that the update is a mean over.
        seed: Of the pass.
    """

    rows: Tensor
    slots: Tensor
    sizes: Sequence[int]
    share: int
    seed: int

    def without(self, idle: Tensor, processes: Processes) -> "Work":
        """The first micro-batches, as many as hold what is not idle in the process that has the most of it.

        One is left at least, which shows whether training recomputes what was sampled. What is idle fills them up, so
        that calls keep their size.

        Args:
            idle: Which samples have no gradient, (B,) bool on the CPU.
            processes: All take as many.
        """
        rests = idle[self.rows]
        busy = int((~rests).sum())
        count = next(number for number, held in enumerate(accumulate(self.sizes), start=1) if held >= busy)
        sizes = self.sizes[: processes.largest(count)]
        order = torch.argsort(rests, stable=True)[: sum(sizes)]
        return replace(self, rows=self.rows[order], slots=self.slots[order], sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """One update's micro-batches, over all processes (a `trainers.epoch.step_rules.Update`).

    Attributes:
        updater: The run's.
        models: The run's, on the chain of the samples.
        experience: This process's samples.
        work: What of them is trained.
        totals: Takes in what is measured, for the epoch's means.
        gate: Looks at the first update of the epoch.
    """

    updater: Updater
    models: Models
    experience: Experience
    work: Work
    totals: Means
    gate: Gate

    def accumulate(self) -> Means:
        """Adds up the gradients of all micro-batches, of all processes, in `.grad`; returns what they measured."""
        by, policy = self.updater, self.models.policy
        num_steps = self.experience.trajectory.schedule.num_steps
        measured, drift = Means(num_steps, policy.device), StepMeans(num_steps, policy.device)
        with gathered(policy, by.distributed):
            models = replace(self.models, surveyed=self._survey()) if by.objective.demand.survey else self.models
            for batch, share in self._cut():
                for loss in by.objective.losses(models, batch):
                    by.scaler.scale(loss.value * share).backward()
                    for means in (measured, self.totals):
                        means.add(loss.metrics, loss.steps)
                    if loss.drift is not None:
                        drift.add(_or_first(loss.steps, loss.drift), {"drift": loss.drift})
        if by.score is not None:
            by.score.tell()
        self.gate.check(drift, by.processes)
        held = self._denoised()
        for learner in by.learners:
            sum_gradients(learner.parameters.values(), by.processes)
        if by.regularizer is not None:
            held |= by.regularizer.pull(by.scaler)
        for means in (measured, self.totals):
            add_measured(means, held)
        return measured

    def _denoised(self) -> dict[str, Tensor]:
        """Adds what the regularizer's own batch has for the gradient; its losses by name."""
        by = self.updater
        if by.regularizer is None:
            return {}
        return by.regularizer.denoise(self.models.policy, by.scaler, update=by.learners[0].counts.updates)

    @torch.no_grad()
    def _survey(self) -> Tensor:
        """The mean of what the objective's survey measures, over all units of all processes."""
        by = self.updater
        objective = cast("Surveying[Any]", by.objective)
        total = torch.zeros((), dtype=torch.float64, device=self.models.policy.device)
        for batch, share in self._cut():
            total += share * objective.survey(self.models, batch).double().mean()
        return by.processes.sum(total).float()

    def geometry(self, *, stride: int) -> Geometry:
        """Of every `stride`-th of its recorded steps."""
        by, work = self.updater, self.work
        assert by.products is not None, "made where the step rule asks for them"
        units = thinned(
            work.rows,
            work.slots,
            start=self.experience.start,
            samples=by.plan.images_per_epoch,
            stride=stride,
            batch_size=by.plan.train_batch_size,
            seed=work.seed,
        )
        return Geometry(
            objective=by.objective,
            models=self.models,
            experience=self.experience,
            units=units,
            products=by.products,
            processes=by.processes,
        )

    def _cut(self) -> Iterator[tuple[object, float]]:
        """The micro-batches, each with its share of all processes' update."""
        by, work = self.updater, self.work
        everyones = by.plan.images_per_epoch * work.share
        start = 0
        for size in by.progress.track(work.sizes, "training"):
            by.processes.safe_point("training")
            if size > 0:
                own = slice(start, start + size)
                batch = by.objective.gather(self.experience, work.rows[own], work.slots[own], seed=work.seed)
                yield batch, size / everyones
            start += size


def deal(experience: Experience, plan: BatchPlan, *, seed: int) -> Iterator[Work]:
    """This process's units of each update of a pass.

    The permutations are drawn for all samples of the epoch, so that they do not depend on the number of processes.
    """
    order = random_orders(plan.images_per_epoch, plan.units_offered, stream(seed))
    own = order[experience.start : experience.start + plan.samples_per_process]
    first = 0
    for share, sizes in zip(plan.shares, plan.micro_batches, strict=True):
        slots = own[:, first : first + share]
        rows = torch.arange(len(slots))[:, None].expand_as(slots)
        yield Work(rows=rows.flatten(), slots=slots.flatten(), sizes=sizes, share=share, seed=seed)
        first += share


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over rows of the same names."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}


def _or_first(steps: Tensor | None, values: Tensor) -> Tensor:
    """The steps at which values were measured; the first where they belong to none, as a whole chain's do."""
    return torch.zeros(len(values), dtype=torch.int64) if steps is None else steps
