"""Sampled denoising chains and what they are conditioned on; all frozen.

B is the batch of samples, T the number of denoising steps, S the number of stored states, N a number of rows, `latent`
the model family's latent shape.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from ddpo import ragged
from ddpo.placement import concatenate, fetch, pinned
from ddpo.sampling.schedule import Schedule
from ddpo.validation import check


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the denoiser is conditioned on, for B samples.

    Attributes:
        positive: Denoiser arguments by dotted name, each (B, ...); sequences of unequal length as in `ddpo.ragged`;
            empty where the denoiser takes nothing that belongs to a sample.
        negative: The same for the unconditional branch; empty without guidance.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor]

    def index(self, rows: Tensor) -> "Condition":
        """The condition of the given rows, (N,) int64 on any device, repeats allowed."""
        return Condition(positive=index_tensors(self.positive, rows), negative=index_tensors(self.negative, rows))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """The same condition with a function applied to each tensor but lengths."""
        return Condition(positive=ragged.apply(function, self.positive), negative=ragged.apply(function, self.negative))

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on another device; pinned memory is copied in the background."""
        return self.map(lambda value: fetch(value, torch.device(device)))

    @staticmethod
    def concatenate(parts: "Sequence[Condition]") -> "Condition":
        """All rows of `parts`, in order."""
        return Condition(
            positive=ragged.join([part.positive for part in parts]),
            negative=ragged.join([part.negative for part in parts]),
        )


@dataclass(frozen=True)
class Keep:
    """Which states of a chain are stored.

    Attributes:
        num_states: The last so many; None for all.
    """

    num_states: int | None

    ALL: ClassVar["Keep"]
    FINAL: ClassVar["Keep"]

    def __post_init__(self) -> None:
        check(self.num_states is None or self.num_states >= 1, "num_states", self.num_states, "at least 1 or None")

    @staticmethod
    def last(num_states: int) -> "Keep":
        """The last states, at least 1: the clean latents are the last."""
        return Keep(num_states)

    def first_state(self, num_steps: int) -> int:
        """Index of the first state that is stored, of those of a chain of T steps."""
        return 0 if self.num_states is None else max(0, num_steps + 1 - self.num_states)


Keep.ALL, Keep.FINAL = Keep(None), Keep(1)


@dataclass(frozen=True, kw_only=True)
class Sites:
    """P places in chains.

    Attributes:
        rows: Which sample, (P,) int64 on the CPU.
        steps: Which step, (P,) int64 on the CPU.
    """

    rows: Tensor
    steps: Tensor

    def within(self, samples: range) -> "Sites":
        """Those of consecutive samples, whose rows are counted from the first of them."""
        own = (self.rows >= samples.start) & (self.rows < samples.stop)
        return Sites(rows=self.rows[own] - samples.start, steps=self.steps[own])

    @staticmethod
    def join(parts: "Sequence[Sites]") -> "Sites":
        """Those of all parts, in order."""
        return Sites(rows=torch.cat([part.rows for part in parts]), steps=torch.cat([part.steps for part in parts]))


@dataclass(frozen=True, kw_only=True)
class Visits:
    """What happened at P sites of chains.

    Attributes:
        sites: Where.
        latents: The state x_k, (P, *latent).
        mean: Mean of the recorded distribution of x_{k+1}, (P, *latent).
    """

    sites: Sites
    latents: Tensor
    mean: Tensor

    def at_steps(self, steps: Sequence[int]) -> "Visits":
        """Those at some of the steps."""
        kept = torch.isin(self.sites.steps, torch.tensor(list(steps), dtype=torch.int64))
        sites = Sites(rows=self.sites.rows[kept], steps=self.sites.steps[kept])
        return Visits(sites=sites, latents=self.latents[kept], mean=self.mean[kept])


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Sampled denoising chains.

    Attributes:
        latents: The last S of the states x_0 .. x_T in sampling order (pure noise first, clean latents last),
            (B, S, *latent) float32; S = T+1 where all are stored. They and the condition may wait on the CPU while the
            rest is on the device.
        log_probs: Log-density of each step under the policy that is trained, (B, T) float64, nats; 0 at deterministic
            steps.
        kl: KL(policy || reference) at each visited state, (B, T) nats, 0 at deterministic steps; None if not measured.
        condition: B rows.
        seeds: Seed of each sample, (B,) int64; sample b is a function of the policy, its condition and seeds[b].
        schedule: The chain's coefficients.
        visits: States and means at the sites that were asked for, to estimate the KL from; None for none.
        means: Means of the recorded distributions at the stochastic steps, in their order, (B, stochastic steps,
            *latent); None if not kept. They wait where the latents do.
        reference_means: The pretrained model's there; None if not kept. They wait where the latents do.
        contenders: At the last C stochastic steps, M next states from the same state, the chain's own first, (B, C, M,
            *latent); None for none. They wait where the latents do.
    """

    latents: Tensor
    log_probs: Tensor
    kl: Tensor | None
    condition: Condition
    seeds: Tensor
    schedule: Schedule
    visits: Visits | None = None
    means: Tensor | None = None
    reference_means: Tensor | None = None
    contenders: Tensor | None = None

    @property
    def contended(self) -> tuple[int, ...]:
        """The steps that contenders end."""
        decisions = self.schedule.stochastic_steps
        return () if self.contenders is None else decisions[len(decisions) - self.contenders.shape[1] :]

    def kept_on_cpu(self) -> "Trajectory":
        """The same with latents, means, contenders and condition in CPU memory, pinned where it came from a GPU."""
        return replace(
            self,
            latents=pinned(self.latents),
            means=None if self.means is None else pinned(self.means),
            reference_means=None if self.reference_means is None else pinned(self.reference_means),
            contenders=None if self.contenders is None else pinned(self.contenders),
            condition=self.condition.map(pinned),
        )

    def to(self, device: torch.device) -> "Trajectory":
        """The same with latents, means, contenders and condition on a device."""
        return replace(
            self,
            latents=self.latents.to(device),
            means=None if self.means is None else self.means.to(device),
            reference_means=None if self.reference_means is None else self.reference_means.to(device),
            contenders=None if self.contenders is None else self.contenders.to(device),
            condition=self.condition.to(device),
        )

    @property
    def final(self) -> Tensor:
        """The clean latents, (B, *latent)."""
        return self.latents[:, -1]

    @property
    def first_state(self) -> int:
        """Index of the first state that is stored."""
        return self.schedule.num_steps + 1 - self.latents.shape[1]

    def state(self, k: int) -> Tensor:
        """The state x_k, (B, *latent); one that is stored."""
        assert self.first_state <= k <= self.schedule.num_steps, f"states from {self.first_state} on are stored"
        return self.latents[:, k - self.first_state]

    def index(self, rows: Tensor) -> "Trajectory":
        """The given samples, (N,) int64 on the CPU, with latents and condition on the device; no visits, contenders."""
        device = self.log_probs.device
        own = rows.to(device)
        return replace(
            self,
            latents=fetch(self.latents[rows.to(self.latents.device)], device),
            log_probs=self.log_probs[own],
            kl=None if self.kl is None else self.kl[own],
            condition=self.condition.index(rows).to(device),
            seeds=self.seeds[rows.to(self.seeds.device)],
            visits=None,
            means=_rows(self.means, rows, device),
            reference_means=_rows(self.reference_means, rows, device),
            contenders=None,
        )

    def first(self, count: int) -> "Trajectory":
        """The first `count` samples, or all if there are fewer; without visits and contenders."""
        rows = torch.arange(min(count, self.latents.shape[0]))
        return replace(
            self,
            latents=self.latents[:count],
            log_probs=self.log_probs[:count],
            kl=None if self.kl is None else self.kl[:count],
            condition=self.condition.index(rows),
            seeds=self.seeds[:count],
            visits=None,
            means=None if self.means is None else self.means[:count],
            reference_means=None if self.reference_means is None else self.reference_means[:count],
            contenders=None,
        )

    @staticmethod
    def concatenate(parts: "Sequence[Trajectory]") -> "Trajectory":
        """All samples of `parts`, in order; they share one schedule."""
        first = parts[0]
        return Trajectory(
            latents=concatenate([part.latents for part in parts]),
            log_probs=torch.cat([part.log_probs for part in parts]),
            kl=None if first.kl is None else torch.cat([part.kl for part in parts if part.kl is not None]),
            condition=Condition.concatenate([part.condition for part in parts]),
            seeds=torch.cat([part.seeds for part in parts]),
            schedule=first.schedule,
            visits=_visits_of_all(parts),
            means=_of_all([part.means for part in parts]),
            reference_means=_of_all([part.reference_means for part in parts]),
            contenders=_of_all([part.contenders for part in parts]),
        )


def _rows(kept: Tensor | None, rows: Tensor, device: torch.device) -> Tensor | None:
    """The given samples' of what may be kept, on the device."""
    return None if kept is None else fetch(kept[rows.to(kept.device)], device)


def _of_all(kept: Sequence[Tensor | None]) -> Tensor | None:
    """What is kept of all parts; None where it is not of every one."""
    known = [part for part in kept if part is not None]
    return concatenate(known) if len(known) == len(kept) else None


def _visits_of_all(parts: Sequence[Trajectory]) -> Visits | None:
    """The visits of all parts, of which each counts its rows from 0."""
    visits = [part.visits for part in parts if part.visits is not None]
    if len(visits) < len(parts):
        return None
    starts = accumulate((len(part.seeds) for part in parts), initial=0)
    rows = [visit.sites.rows + start for visit, start in zip(visits, starts, strict=False)]
    return Visits(
        sites=Sites(rows=torch.cat(rows), steps=torch.cat([visit.sites.steps for visit in visits])),
        latents=torch.cat([visit.latents for visit in visits]),
        mean=torch.cat([visit.mean for visit in visits]),
    )


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What was sampled, with what it was sampled for.

    Attributes:
        prompts: B texts.
        metadata: B dictionaries as rewards see them: for a pipeline that edits, `image` is what it was given.
        trajectory: B samples.
    """

    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, object], ...]
    trajectory: Trajectory

    def __len__(self) -> int:
        return len(self.prompts)

    def index(self, rows: Tensor) -> "Samples":
        """The given samples, (N,) int64 on the CPU, as `Trajectory.index` gives them."""
        chosen = rows.tolist()
        return Samples(
            prompts=tuple(self.prompts[row] for row in chosen),
            metadata=tuple(self.metadata[row] for row in chosen),
            trajectory=self.trajectory.index(rows),
        )

    @staticmethod
    def concatenate(parts: "Sequence[Samples]") -> "Samples":
        """All samples of `parts`, in order."""
        return Samples(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            metadata=tuple(entry for part in parts for entry in part.metadata),
            trajectory=Trajectory.concatenate([part.trajectory for part in parts]),
        )


def index_tensors(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Rows of every tensor in a dictionary, with the index moved to the tensors' device once."""
    on: dict[torch.device, Tensor] = {}
    return {name: value[on.setdefault(value.device, rows.to(value.device))] for name, value in tensors.items()}
