"""Samples denoising chains from a policy, with the log-probability of every step; or takes steps again with a graph.

Sample b is a function of the policy, its condition and seeds[b]: not of the batch it is in, its place there or the
process that draws it (to the rounding of the network's batched kernels). B is the batch, T the number of steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.path_kl import kl_to_reference
from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.schedule import Schedule
from ddpo.steering.base import Draw, State, Steer, weights_of
from ddpo.trajectory import Condition, Keep, Sites, Trajectory, Visits

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy

UNSTEERED = Steer()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of B chains.

    Attributes:
        k: Its index.
        before: The states x_k that the rows continue, (B, *latent).
        recorded: The distribution of x_{k+1} that is trained.
        after: The states x_{k+1}, (B, *latent).
        ancestors: Which row's x_k each row continues, (B,) int64; None where each continues its own.
        steer: Steers the next step.
    """

    k: int
    before: Tensor
    recorded: Gaussian
    after: Tensor
    ancestors: Tensor | None
    steer: Steer


def rollout(
    policy: "Policy",
    condition: Condition,
    seeds: Tensor,
    *,
    recorded: "Policy | None" = None,
    with_kl: bool = False,
    keep: Keep = Keep.ALL,
    means: bool = False,
    reference_means: bool = False,
    sites: Sites | None = None,
    gradient: bool = False,
    steer: Steer = UNSTEERED,
    latents: Tensor | None = None,
) -> Trajectory:
    """Samples B chains of T steps.

    Args:
        policy: What is sampled from, on its own chain; on an ODE all log-probabilities are 0.
        condition: B rows.
        seeds: One seed a sample, (B,) int64.
        recorded: Whose log-probabilities, KL and means are recorded; default the policy's own. Its `conditional` view
            where that is trained on guided samples: the same passes of the network give both.
        with_kl: Whether to measure the KL to the pretrained model at every stochastic step: one more pass each.
        keep: Which states are stored.
        means: Whether the recorded means of the stochastic steps are stored as well.
        reference_means: With `with_kl`, whether the pretrained model's means of these steps are.
        sites: Where states and recorded means are stored besides, as `visits` (`ddpo.path_kl`); not with a steering
            that resamples.
        gradient: Whether to record the graph of the whole chain, by the weights and the initial latents; the KL has
            none.
        steer: What is done to the samples on the way.
        latents: Initial latents, (B, *latent); default the prior's, from the seeds.

    Returns:
        The trajectories on the policy's device, float32 but for the log-probabilities.
    """
    with torch.enable_grad() if gradient else torch.no_grad():
        noise = policy.noise(seeds)
        x = noise[:, 0] if latents is None else latents.to(noise)
        record = _Record(policy.schedule, x, keep=keep, with_kl=with_kl, with_means=means, sites=sites)
        for step in chain(policy, x, condition, noise, seeds, recorded=recorded, steer=steer):
            record.add(step)
        trained = recorded or policy
        reference = kl_to_reference(trained, record.states, condition, record.steps, like=x) if with_kl else None
        return Trajectory(
            latents=record.latents(),
            log_probs=torch.stack(record.log_probs, dim=1),
            kl=None if reference is None else reference.kl,
            condition=condition,
            seeds=seeds,
            schedule=policy.schedule,
            visits=record.visits(),
            means=record.stacked({k: step.mean for k, step in record.steps.items()}) if means else None,
            reference_means=record.stacked(reference.means) if reference is not None and reference_means else None,
        )


def recompute(policy: "Policy", trajectory: Trajectory, *, start: int, recorded: "Policy | None" = None) -> list[Step]:
    """The steps from `start` on, taken again from the stored state and the samples' own noise, (T - start) of them.

    With a graph where the caller records one, the last step's `after` is the clean latents as a function of the
    weights, and of the state at `start` if that requires gradients. It must be what was sampled: how far it is from
    `trajectory.final` tells whether training runs the network that sampled. Of samples that were steered it is not.

    Args:
        policy: On any chain; that of the trajectory is taken.
        trajectory: Holds the state at `start`.
        start: First step to take again.
        recorded: As for `rollout`.
    """
    policy = policy.at(trajectory.schedule)
    recorded = recorded and recorded.at(trajectory.schedule)
    x, noise = trajectory.state(start), policy.noise(trajectory.seeds)
    return list(chain(policy, x, trajectory.condition, noise, trajectory.seeds, start=start, recorded=recorded))


def chain(
    policy: "Policy",
    x: Tensor,
    condition: Condition,
    noise: Tensor,
    seeds: Tensor,
    *,
    start: int = 0,
    recorded: "Policy | None" = None,
    steer: Steer = UNSTEERED,
) -> Iterator[Step]:
    """Takes the steps of B chains, from `start` on.

    Args:
        policy: What is sampled from.
        x: States at `start`, (B, *latent).
        condition: B rows.
        noise: As from `Policy.noise`, (B, T+1, *latent); entry k+1 is step k's.
        seeds: The samples', (B,) int64, for what a steering draws besides.
        start: First step.
        recorded: Whose distribution is recorded; default the policy's own.
        steer: As for `rollout`.
    """
    assert recorded is None or recorded.schedule is policy.schedule, "one chain"
    stochastic = policy.schedule.stochastic_steps
    outputs = None
    for k in range(start, policy.schedule.num_steps):
        if outputs is None:
            with weights_of(policy, k):
                outputs = policy.outputs(k, x, condition)
        prediction = policy.prediction(k, x, outputs)
        own = policy.distribution(k, prediction)
        trained = own
        if recorded is not None and recorded is not policy:
            trained = recorded.distribution(k, recorded.prediction(k, x, outputs))
        state = State(k=k, x=x, prediction=prediction, gaussian=own, condition=condition, seeds=seeds)
        proposal, is_noisy = steer.propose(state, policy), k in stochastic
        candidates = proposal.sample(noise[:, k + 1]) if is_noisy else proposal.mean
        draw = Draw(state=state, proposal=proposal, noise=noise[:, k + 1], is_noisy=is_noisy, candidates=candidates)
        selection = steer.select(draw, policy)
        ancestors, steer = selection.ancestors, selection.then
        if ancestors is not None:
            x, trained = x[ancestors], replace(trained, mean=trained.mean[ancestors])
        yield Step(k=k, before=x, recorded=trained, after=selection.latents, ancestors=ancestors, steer=steer)
        x, outputs = selection.latents, selection.outputs


class _Record:
    """What is stored of the steps of a rollout; all of it follows its row where a steering resamples."""

    def __init__(
        self, schedule: Schedule, x: Tensor, *, keep: Keep, with_kl: bool, with_means: bool, sites: Sites | None
    ) -> None:
        num_steps, self._stochastic = schedule.num_steps, schedule.stochastic_steps
        self._kept = range(keep.first_state(num_steps), num_steps + 1)
        self._measured = self._stochastic if with_kl else ()
        self._recorded = self._stochastic if with_kl or with_means else ()
        self._sites = sites
        self._visited: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._zeros = x.new_zeros(x.shape[0], dtype=torch.float64)
        self.log_probs: list[Tensor] = []
        self.states: dict[int, Tensor] = {}
        self.steps: dict[int, Gaussian] = {}
        self._store(0, x)

    def add(self, step: Step) -> None:
        """Takes the next step."""
        if step.ancestors is not None:
            self._follow(step.ancestors)
        is_decision = step.k in self._stochastic
        self.log_probs.append(step.recorded.log_prob(step.after) if is_decision else self._zeros)
        self._store(step.k + 1, step.after)
        if step.k in self._recorded:
            self.steps[step.k] = step.recorded
        if self._sites is not None:
            here = self._sites.steps == step.k
            rows = self._sites.rows[here]
            self._visited.append((rows, self._sites.steps[here], step.before[rows], step.recorded.mean[rows]))

    def latents(self) -> Tensor:
        """The states that are kept, (B, S, *latent)."""
        return torch.stack([self.states[k] for k in self._kept], dim=1)

    def stacked(self, means: Mapping[int, Tensor]) -> Tensor:
        """The means of the stochastic steps, (B, stochastic steps, *latent)."""
        return torch.stack([*means.values()], dim=1) if means else self.states[self._kept[-1]][:, None][:, :0]

    def visits(self) -> Visits | None:
        """The states and means at the sites, by step; None for none."""
        if self._sites is None:
            return None
        rows, steps, latents, mean = (torch.cat(parts) for parts in zip(*self._visited, strict=True))
        return Visits(sites=Sites(rows=rows, steps=steps), latents=latents, mean=mean)

    def _store(self, k: int, x: Tensor) -> None:
        if k in self._kept or k in self._measured:
            self.states[k] = x

    def _follow(self, ancestors: Tensor) -> None:
        assert self._sites is None, "sites are of rows that nothing resamples"
        self.log_probs = [values[ancestors] for values in self.log_probs]
        self.states = {k: x[ancestors] for k, x in self.states.items()}
        self.steps = {k: replace(step, mean=step.mean[ancestors]) for k, step in self.steps.items()}
