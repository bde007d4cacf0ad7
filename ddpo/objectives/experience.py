"""What an epoch gives to its objective: samples and what they are worth."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddpo.trajectory import Samples, Trajectory


@dataclass(frozen=True, kw_only=True)
class Experience:
    """The samples of this process, and the scores of all N samples of the epoch.

    Attributes:
        samples: B of them, with what they were sampled for.
        start: Place of the first of them among the epoch's.
        scores: What is maximised, of every sample of the epoch, (N,).
        groups: Which of them share a prompt slot, (N,) int64.
        advantages: (B, T), the reward minus its baseline minus the KL cost-to-go, divided by the advantage scale.
        kl_weight: Weight of each sample's own per-step KL in the loss, (B,); alpha over the advantage scale.
        penalised: Whether alpha > 0, i.e. the loss has a KL term.
        alpha: Weight of the KL in reward units per nat, whatever advantages are divided by.
        contests: Scores of the contenders of every sample of the epoch, (N, C, M); None where there are none.
        scale: What the advantages of each sample were divided by, (B,) reward units; None where no scores were.
        prepared: What the objective's own preparation has made of it; None before, and where there is none.
    """

    samples: Samples
    start: int
    scores: Tensor
    groups: Tensor
    advantages: Tensor
    kl_weight: Tensor
    penalised: bool
    alpha: float = 0.0
    contests: Tensor | None = None
    scale: Tensor | None = None
    prepared: object | None = None

    @property
    def trajectory(self) -> Trajectory:
        """The chains of the samples."""
        return self.samples.trajectory

    @cached_property
    def decisions(self) -> Tensor:
        """The steps with noise, (S,) int64 on the CPU."""
        return torch.tensor(self.trajectory.schedule.stochastic_steps, dtype=torch.int64)
