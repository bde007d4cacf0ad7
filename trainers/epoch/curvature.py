"""The geometry of an update: Fisher products, and how far a step moves the policy, over some of its recorded steps.

Every so-manieth unit of the update is looked at, the same ones however many processes share them; all numbers are means
over those of all processes, and so the same on each of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ddpo.curvature import FisherProducts, Vector
from ddpo.objectives import Experience, Models, Objective
from ddpo.objectives.base import Recorded
from ddpo.sampling.gaussian import Gaussian
from ddpo.seeds import Purpose, fill_noise, one_seed
from trainers.parallel.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Units:
    """Which of an update's M units in this process are looked at.

    Attributes:
        rows: Their samples, (L,) int64 on the CPU.
        slots: Which of a sample's units, (L,) int64 on the CPU.
        places: Where they are among the update's units of all processes, (L,) int64.
        everyones: Their number over all processes.
        batch_size: At a time.
        seed: Of the pass.
    """

    rows: Tensor
    slots: Tensor
    places: Tensor
    everyones: int
    batch_size: int
    seed: int


def thinned(rows: Tensor, slots: Tensor, *, start: int, samples: int, stride: int, batch_size: int, seed: int) -> Units:
    """Every `stride`-th unit of an update.

    Args:
        rows: Samples of this process, (M,), as many units of each, one sample after the other.
        slots: Which units, (M,).
        start: Place of this process's first sample in the epoch.
        samples: Of all processes.
        stride: Takes each so-manieth.
        batch_size: Units at a time.
        seed: Of the pass.
    """
    each = int((rows == rows[0]).sum()) if len(rows) else 1
    places = (start + rows) * each + torch.arange(len(rows)) % each
    chosen = places % stride == 0
    return Units(
        rows=rows[chosen],
        slots=slots[chosen],
        places=places[chosen],
        everyones=-(-samples * each // stride),
        batch_size=batch_size,
        seed=seed,
    )


@dataclass(kw_only=True)
class Geometry:
    """Of one update.

    Attributes:
        objective: Whose units are recorded steps.
        models: Of the run, on the chain of the samples.
        experience: Of this process.
        units: What is looked at.
        products: How products are made.
        processes: Over whom numbers are means.
        remembered: Means before a step, on the CPU, batch by batch.
        worth: What the steps were worth then.
    """

    objective: Objective[Any]
    models: Models
    experience: Experience
    units: Units
    products: FisherProducts
    processes: Processes
    remembered: list[Tensor] = field(default_factory=list)
    worth: float = 0.0

    def product(self, direction: Vector) -> Vector:
        """F v, F the mean over steps, nats by the square of the weights."""
        self.processes.safe_point("training")
        total = _zeros(direction)
        for batch, _ in self._batches():
            _add(total, self.products.product(self._whitened(batch), direction))
        return self._mean(total)

    def diagonal(self, probes: int) -> Vector:
        """An unbiased estimate of the diagonal of F, at least 0."""
        own = {name: value.detach() for name, value in self.models.policy.trainable().items()}
        found = _zeros(own)
        for number in range(probes):
            total = _zeros(own)
            for batch, places in self._batches():
                _add(total, self.products.pulled_back(self._whitened(batch), self._probe(places, number)))
            for name, value in self._mean(total).items():
                found[name] += value.square() * (self.units.everyones / probes)
        return found

    @torch.no_grad()
    def remember(self) -> None:
        """Takes the policy as it is for the one before a step."""
        self.remembered, worth = [], 0.0
        for batch, _ in self._batches():
            now = self._objective.distribution(self.models, batch)
            self.remembered.append(now.mean.cpu())
            worth += float(self._objective.improvement(self.models, batch, now).double().sum())
        (self.worth,) = self._sums(worth)

    @torch.no_grad()
    def moved(self) -> tuple[float, float]:
        """What the steps have become worth more since then, and their KL(before || now), nats; means over steps."""
        worth, nats = 0.0, 0.0
        for (batch, _), mean in zip(self._batches(), self.remembered, strict=True):
            now = self._objective.distribution(self.models, batch)
            before = Gaussian(mean=mean.to(now.mean.device), std=now.std)
            nats += float(before.kl(now).double().sum())
            worth += float(self._objective.improvement(self.models, batch, now).double().sum())
        worth, nats = self._sums(worth, nats)
        return (worth - self.worth) / self.units.everyones, nats / self.units.everyones

    @property
    def _objective(self) -> "_RecordedObjective":
        return cast("_RecordedObjective", self.objective)

    def _whitened(self, batch: object) -> Callable[[], Tensor]:
        def whitened() -> Tensor:
            found = self._objective.distribution(self.models, batch)
            return found.mean / found.std

        return whitened

    def _batches(self) -> Iterator[tuple[object, Tensor]]:
        """The units that are looked at, some at a time, with their places."""
        units = self.units
        for part in torch.arange(len(units.rows)).split(units.batch_size):
            if len(part):
                rows, slots = units.rows[part], units.slots[part]
                yield self.objective.gather(self.experience, rows, slots, seed=units.seed), units.places[part]

    def _probe(self, places: Tensor, number: int) -> Tensor:
        """Standard normal numbers for units, (N, *latent), by their places alone."""
        policy = self.models.policy
        seeds = [one_seed(self.units.seed, number, place, purpose=Purpose.SITES) for place in places.tolist()]
        noise = torch.empty(len(seeds), *policy.latent_shape)
        fill_noise(noise, torch.tensor(seeds))
        return noise.to(policy.device)

    def _mean(self, total: Vector) -> Vector:
        """Sums of all processes over the number of steps."""
        flat = torch.cat([value.flatten() for value in total.values()])
        flat = self.processes.sum(flat) if self.processes.count > 1 else flat
        pieces = (flat / self.units.everyones).split([value.numel() for value in total.values()])
        return {name: piece.view_as(total[name]) for name, piece in zip(total, pieces, strict=True)}

    def _sums(self, *values: float) -> Sequence[float]:
        """Each over all processes."""
        own = torch.tensor(values, dtype=torch.float64, device=self.models.policy.device)
        return self.processes.sum(own).tolist()


class _RecordedObjective(Objective[Any], Recorded[Any]):
    """What a trust region is given: `trainers.config` refuses others."""


def _zeros(like: Vector) -> Vector:
    return {name: torch.zeros_like(value) for name, value in like.items()}


def _add(total: Vector, more: Vector) -> None:
    for name, value in more.items():
        total[name] += value
