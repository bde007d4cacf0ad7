"""How far the policy that sampled an epoch is from the pretrained model, in nats.

Where the KL has a weight, sampling measures it at every stochastic step of every sample. Where it is only logged, it is
estimated from few random sites (`ddpo.path_kl`), of which sampling keeps the means: a row of the pretrained network for
each, at most 3% of an epoch's, whatever its size.

That KL is of the steps that have noise in this epoch, and of them alone. Where a window leaves others to the ODE, what
these would add under the sampler's full noise is estimated too, from sites of their own; of all samples, where an
adaptive weight or a constraint follows the sum, which can be compared between windows.
"""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ddpo import Policy, Schedule, Trajectory
from ddpo.path_kl import full_noise_visit_kl, path_kl_estimate, visit_kl
from trainers.parallel.processes import Processes


@dataclass(frozen=True, kw_only=True)
class EpochKL:
    """The path KL of an epoch, over all processes.

    Attributes:
        mean: Sum over steps, mean over samples, nats.
        standard_error: Of the mean as an estimate of these samples' own; 0 if all were measured, None for one site.
        per_step: Mean of each step, (T,) nats; NaN where none was measured.
        of_all: Of every step of all N samples, (N, T) nats; None if it was estimated.
        full_noise: What the mean would be if every step had the sampler's full noise, at the same states, nats; None
            where every step that can have noise has it.
    """

    mean: float
    standard_error: float | None
    per_step: Tensor
    of_all: Tensor | None
    full_noise: float | None = None

    @property
    def held(self) -> float:
        """The KL that weights and bounds follow: with full noise where the epoch's own steps have less, nats."""
        return self.mean if self.full_noise is None else self.full_noise


def measured_kl(trajectory: Trajectory, processes: Processes) -> EpochKL:
    """The KL that sampling has measured of everything."""
    assert trajectory.kl is not None, "sampled with_kl"
    of_all = processes.gather(trajectory.kl).cpu()
    return EpochKL(mean=float(of_all.sum(1).mean()), standard_error=0.0, per_step=of_all.mean(0), of_all=of_all)


def estimated_kl(
    policy: Policy, trajectory: Trajectory, processes: Processes, *, batch_size: int, in_step: bool
) -> EpochKL:
    """The KL estimated from the sites that sampling has kept.

    Args:
        policy: The view that is trained, at the weights that sampled.
        trajectory: Of this process, with visits.
        processes: Who shares the epoch.
        batch_size: Sites per call of the network.
        in_step: Whether all processes must call the network as often.
    """
    assert trajectory.visits is not None, "sampled with sites"
    trajectory = replace(trajectory, visits=trajectory.visits.at_steps(trajectory.schedule.stochastic_steps))
    assert trajectory.visits is not None
    steps = trajectory.visits.sites.steps
    num_calls = processes.largest(math.ceil(len(steps) / batch_size)) if in_step else 0
    kl = visit_kl(policy, trajectory, batch_size=batch_size, num_calls=num_calls)
    found = path_kl_estimate(processes.gather(kl.cpu()), processes.gather(steps), trajectory.schedule)
    return EpochKL(mean=found.mean, standard_error=found.standard_error, per_step=found.per_step, of_all=None)


def estimated_hidden_kl(
    policy: Policy,
    trajectory: Trajectory,
    hidden: Schedule,
    processes: Processes,
    *,
    batch_size: int,
    in_step: bool,
) -> float:
    """What the steps that an epoch leaves to the ODE would add to its KL with the sampler's full noise, nats.

    The mean of these samples themselves, where all of them have sites at all those steps.

    Args:
        policy: As for `estimated_kl`.
        trajectory: Of this process, with visits at those steps.
        hidden: The chain with noise in them alone.
        processes: As for `estimated_kl`, like `batch_size` and `in_step`.
        batch_size: Sites per call of the network.
        in_step: Whether all processes must call the network as often.
    """
    assert trajectory.visits is not None, "sampled with sites"
    visits = trajectory.visits.at_steps(hidden.stochastic_steps)
    num_calls = processes.largest(math.ceil(len(visits.sites.steps) / batch_size)) if in_step else 0
    kl = full_noise_visit_kl(
        policy, replace(trajectory, visits=visits), batch_size=batch_size, num_calls=num_calls
    )  # fmt: skip
    return path_kl_estimate(processes.gather(kl.cpu()), processes.gather(visits.sites.steps), hidden).mean
