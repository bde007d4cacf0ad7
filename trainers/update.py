"""The second half of an epoch: optimizer steps on the collected transitions.

Each inner epoch permutes every sample's stochastic steps; update u takes its own share of them from every sample. An
update is accumulated over micro-batches of transitions, of any samples and steps mixed, so that memory is bounded by
`train_batch_size` alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo import Experience, Transitions, sample_seeds
from ddpo.objectives import Objective
from trainers.gradients import sum_gradients
from trainers.metrics import StepMeans
from trainers.plan import BatchPlan
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.sharding import gathered, norm_of
from trainers.state import TrainState

MAX_SKIPPED_IN_A_ROW = 3


class GateError(RuntimeError):
    """Training does not reproduce the log-probabilities of sampling."""


class DivergedError(RuntimeError):
    """Gradients stay non-finite."""


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What the updates of an epoch measured, over all processes.

    Attributes:
        per_step: Means by name, (T,) each, NaN at steps that were not trained.
        overall: Means by name.
        gate: mean |log-prob recomputed - sampled| of each step before the first update, (T,) nats; NaN at steps that
            this update did not train.
        grad_norm: Mean gradient norm before clipping; NaN if every update was skipped.
        learning_rate: Of the last update.
        skipped: Updates skipped for non-finite gradients.
    """

    per_step: dict[str, Tensor]
    overall: dict[str, float]
    gate: Tensor
    grad_norm: float
    learning_rate: float
    skipped: int


def update(
    state: TrainState,
    objective: Objective,
    experience: Experience,
    plan: BatchPlan,
    processes: Processes,
    progress: Progress,
) -> UpdateReport:
    """Takes an epoch's optimizer steps.

    Args:
        state: The run; weights, optimizer, averages and counters change.
        objective: Yields the losses.
        experience: This process's samples.
        plan: Sizes of the updates.
        processes: Whose gradients are averaged.
        progress: Shows the micro-batches.

    Raises:
        GateError: Before the first update, recomputed log-probabilities differ from the sampled ones.
        DivergedError: The third non-finite gradient in a row.
        Interrupted: A signal has reached some process; weights and optimizer are then in the middle of an epoch.
    """
    num_steps, device = experience.trajectory.schedule.num_steps, state.policy.device
    means = StepMeans(num_steps, device)
    gate: Tensor | None = None
    norms: list[float] = []
    skipped = state.skipped
    for inner in range(plan.inner_epochs):
        parts = partition(state, experience, plan, processes, inner=inner)
        for (rows, steps), sizes in zip(parts, plan.micro_batches, strict=True):
            first = StepMeans(num_steps, device)
            with gathered(state.policy, state.config.distributed):
                for batch in micro_batches(experience, rows, steps, sizes, plan, processes, progress):
                    for loss in objective(state.policy, batch):
                        state.scaler.scale(loss.value).backward()
                        means.add(batch.steps, loss.metrics)
                        first.add(batch.steps, {"gate": loss.metrics["log_ratio"].abs()})
            if gate is None:
                measured = first.reduce(processes)["gate"]
                gate = check_gate(measured, first.seen(processes), experience, state.config.gate_tolerance_nats)
            sum_gradients(state.policy.trainable().values(), processes)
            norms += optimizer_step(state, plan)
    assert gate is not None
    per_step = means.reduce(processes)
    return UpdateReport(
        per_step=per_step,
        overall=means.overall(per_step, processes),
        gate=gate,
        grad_norm=sum(norms) / len(norms) if norms else float("nan"),
        learning_rate=state.optimizer.param_groups[0]["lr"],
        skipped=state.skipped - skipped,
    )


def partition(
    state: TrainState, experience: Experience, plan: BatchPlan, processes: Processes, *, inner: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The transitions of each update of an inner epoch, as (rows, steps), both (N,) int64 on the CPU.

    The permutations are drawn for all samples of the epoch, so that they do not depend on the number of processes.
    """
    seed = int(sample_seeds(state.config.seed, state.epoch, range(-1 - inner, -inner))[0])
    generator = torch.Generator().manual_seed(seed)
    own = processes.share(plan.images_per_epoch)
    stochastic = torch.tensor(experience.trajectory.schedule.stochastic_steps)
    order = torch.rand(plan.images_per_epoch, len(stochastic), generator=generator).argsort(1)
    chosen = stochastic[order[own.start : own.stop]]
    first = 0
    for share in plan.shares:
        steps = chosen[:, first : first + share]
        rows = torch.arange(len(steps))[:, None].expand_as(steps)
        yield rows.flatten(), steps.flatten()
        first += share


def micro_batches(
    experience: Experience,
    rows: Tensor,
    steps: Tensor,
    sizes: Sequence[int],
    plan: BatchPlan,
    processes: Processes,
    progress: Progress,
) -> Iterator[Transitions]:
    """Cuts a process's transitions of an update into micro-batches, each with its share of all processes' update."""
    everyones = plan.images_per_epoch * len(rows) // plan.samples_per_process
    start = 0
    for size in progress.track(sizes, "training"):
        processes.safe_point("training")
        if size > 0:
            own = slice(start, start + size)
            yield experience.transitions(rows[own], steps[own], share=size / everyones)
        start += size


def check_gate(gate: Tensor, seen: Tensor, experience: Experience, tolerance: float) -> Tensor:
    """Refuses to train when the recomputed log-probabilities are not those of sampling.

    Args:
        gate: mean |difference| of each step, (T,) nats, NaN at steps not seen.
        seen: Which steps were measured, (T,) bool; a NaN there is a difference without bound.
        experience: The samples.
        tolerance: Nats per latent dimension.

    Returns:
        `gate`.

    Raises:
        GateError: A step is above the tolerance, or NaN.
    """
    dims = experience.trajectory.latents[0, 0].numel()
    worst = int(gate.nan_to_num(math.inf).where(seen, -1.0).argmax())
    if not float(gate[worst]) <= tolerance * dims:
        raise GateError(
            "before the first update, the log-probabilities recomputed in training differ from those of sampling by "
            f"{float(gate[worst]):.3g} nats on average at step {worst} (tolerance {tolerance:g} nats per dimension x "
            f"{dims} dimensions = {tolerance * dims:.3g}): importance ratios would be wrong. Causes: dropout or other "
            "randomness in the network, different precision or weights in the two phases, or batch-dependent kernels "
            "(try equal sample_batch_size and train_batch_size, or model.precision: fp32). If this size is expected, "
            "raise gate_tolerance."
        )
    return gate


def optimizer_step(state: TrainState, plan: BatchPlan) -> list[float]:
    """Clips the gradient and steps, or skips a non-finite one.

    Returns:
        The gradient norm, or nothing if the step was skipped.

    Raises:
        DivergedError: The third skip in a row.
    """
    options = state.config.optimizer
    for group in state.optimizer.param_groups:
        group["lr"] = state.config.learning_rate * rate_factor(
            state.updates, options.schedule, options.warmup_updates, plan.optimizer_steps_total
        )
    state.scaler.unscale_(state.optimizer)
    norm = norm_of(torch.nn.utils.clip_grad_norm_(state.policy.trainable().values(), options.max_grad_norm))
    finite = norm < float("inf")
    if finite:
        state.scaler.step(state.optimizer)
        state.ema.update()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.updates += 1
    state.skipped += not finite
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"the gradient was not finite in {MAX_SKIPPED_IN_A_ROW} updates in a row (up to update {state.updates}); "
            "lower optimizer.learning_rate, or use model.precision: fp32 or bf16"
        )
    return [norm] if finite else []


def rate_factor(update_index: int, schedule: str, warmup: int, total: int) -> float:
    """An update's learning rate over its peak: linear warm-up, then constant, linear to 0, or half a cosine."""
    if update_index < warmup:
        return (update_index + 1) / warmup
    done = min(1.0, (update_index - warmup) / max(1, total - warmup))
    match schedule:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0
