"""The data that flow through a training epoch; all frozen.

B is the batch of samples, T the number of denoising steps, N a number of transitions (sample, step), `latent` the
model family's latent shape.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo import ragged
from ddpo.placement import concatenate, fetch, pinned
from ddpo.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What the denoiser is conditioned on.

    Attributes:
        prompts: B texts.
        metadata: B dictionaries, handed to rewards as they came with the prompts.
        positive: Denoiser arguments by dotted name, each (B, ...); sequences of unequal length as in `ddpo.ragged`.
        negative: The same for the unconditional branch; empty without guidance.
    """

    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, object], ...]
    positive: dict[str, Tensor]
    negative: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    def index(self, rows: Tensor) -> "Condition":
        """The condition of the given rows, (N,) int64 on any device, repeats allowed."""
        chosen = rows.tolist()
        return Condition(
            prompts=tuple(self.prompts[row] for row in chosen),
            metadata=tuple(self.metadata[row] for row in chosen),
            positive=index_tensors(self.positive, rows),
            negative=index_tensors(self.negative, rows),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        """The same condition with a function applied to each tensor but lengths."""
        return replace(
            self,
            positive=ragged.apply(function, self.positive),
            negative=ragged.apply(function, self.negative),
        )

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on another device; pinned memory is copied in the background."""
        return self.map(lambda value: fetch(value, torch.device(device)))

    @staticmethod
    def concatenate(parts: "Sequence[Condition]") -> "Condition":
        """All rows of `parts`, in order."""
        return Condition(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            metadata=tuple(entry for part in parts for entry in part.metadata),
            positive=ragged.join([part.positive for part in parts]),
            negative=ragged.join([part.negative for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Sampled denoising chains.

    Attributes:
        latents: States x_0 .. x_T in sampling order (pure noise first), (B, T+1, *latent) float32; they and the
            condition may wait on the CPU while the rest is on the device.
        log_probs: Log-density of each step under the policy that is trained, (B, T) float64, nats; 0 at deterministic
            steps.
        kl: KL(policy || reference) at each visited state, (B, T) nats, 0 at deterministic steps; None if not measured.
        condition: B rows.
        seeds: Seed of each sample, (B,) int64; sample b is a function of the policy, its condition and seeds[b].
        schedule: The chain's coefficients.
    """

    latents: Tensor
    log_probs: Tensor
    kl: Tensor | None
    condition: Condition
    seeds: Tensor
    schedule: Schedule

    def kept_on_cpu(self) -> "Trajectory":
        """The same with latents and condition in CPU memory, pinned where it came from a GPU."""
        return replace(self, latents=pinned(self.latents), condition=self.condition.map(pinned))

    def to(self, device: torch.device) -> "Trajectory":
        """The same with latents and condition on a device."""
        return replace(self, latents=self.latents.to(device), condition=self.condition.to(device))

    @property
    def final(self) -> Tensor:
        """The denoised latents, (B, *latent)."""
        return self.latents[:, -1]

    def first(self, count: int) -> "Trajectory":
        """The first `count` samples, or all if there are fewer."""
        rows = torch.arange(min(count, self.latents.shape[0]))
        return replace(
            self,
            latents=self.latents[:count],
            log_probs=self.log_probs[:count],
            kl=None if self.kl is None else self.kl[:count],
            condition=self.condition.index(rows),
            seeds=self.seeds[:count],
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
        )


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A scored set of trajectories.

    Attributes:
        trajectory: B samples.
        scores: Total reward, (B,).
        advantages: (B, T), the reward minus its baseline minus the KL cost-to-go, divided by the advantage scale.
        kl_weight: Weight of each sample's own per-step KL in the loss, (B,); alpha over the advantage scale.
        groups: Which samples share a prompt slot, (B,) int64.
        penalised: Whether alpha > 0, i.e. the loss has a KL term.
    """

    trajectory: Trajectory
    scores: Tensor
    advantages: Tensor
    kl_weight: Tensor
    groups: Tensor
    penalised: bool

    def transitions(self, rows: Tensor, steps: Tensor, *, share: float) -> "Transitions":
        """The transitions (rows[n], steps[n]).

        Args:
            rows: Samples, (N,) int64.
            steps: Denoising steps, (N,) int64.
            share: What part of its update these N transitions are, in (0, 1].
        """
        path, device = self.trajectory, self.trajectory.log_probs.device
        return Transitions(
            steps=steps,
            latents=fetch(path.latents[rows, steps], device),
            next_latents=fetch(path.latents[rows, steps + 1], device),
            log_probs=path.log_probs[rows, steps],
            advantages=self.advantages[rows, steps],
            kl_weight=self.kl_weight[rows],
            penalised=self.penalised,
            condition=path.condition.index(rows).to(device),
            share=share,
        )


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """A micro-batch of N independent denoising steps, of any samples and steps.

    Attributes:
        steps: Step index k, (N,) int64.
        latents: State x_k, (N, *latent).
        next_latents: The sampled x_{k+1}, (N, *latent).
        log_probs: Its log-density when it was sampled, (N,) float64, nats.
        advantages: (N,).
        kl_weight: (N,), see `Experience`.
        penalised: Whether alpha > 0.
        condition: N rows.
        share: What part of its update this micro-batch is; losses are means times share, so that they add up.
    """

    steps: Tensor
    latents: Tensor
    next_latents: Tensor
    log_probs: Tensor
    advantages: Tensor
    kl_weight: Tensor
    penalised: bool
    condition: Condition
    share: float

    def __len__(self) -> int:
        return self.steps.shape[0]


def index_tensors(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Rows of every tensor in a dictionary, with the index moved to the tensors' device once."""
    on: dict[torch.device, Tensor] = {}
    return {name: value[on.setdefault(value.device, rows.to(value.device))] for name, value in tensors.items()}
