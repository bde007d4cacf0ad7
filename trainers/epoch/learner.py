"""What is trained together by one optimizer, and what must be saved of it.

A checkpoint holds, for the learner `policy`, the groups of tensors `weights`, `optimizer` and one for each average by
its name (`ema`, `old`), and the values `updates`, `skipped`, `skipped_in_a_row` and `<average>_steps`; for any other
learner the same under `<name>.`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddpo.weights.average import Average, When
from trainers.epoch.optimizers import load_optimizer, optimizer_tensors, reset_optimizer
from trainers.parallel.sharding import local
from trainers.run_folder.saved_weights import copy_saved

POLICY = "policy"
Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(kw_only=True)
class UpdateCounts:
    """Optimizer steps of a learner.

    Attributes:
        updates: Taken, skipped ones included.
        skipped: Skipped for non-finite gradients.
        skipped_in_a_row: The same, since the last good one.
    """

    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(kw_only=True)
class Learner:
    """Parameters that one optimizer steps.

    Attributes:
        name: `policy`, or what else is trained.
        parameters: By name, in the optimizer's order.
        optimizer: Over them; its default learning rate is the peak.
        averages: Averages of the parameters by name.
        counts: Its steps.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    averages: dict[str, Average] = field(default_factory=dict)
    counts: UpdateCounts = field(default_factory=UpdateCounts)

    def update_averages(self, *, after: When) -> None:
        """Takes the present weights into the averages that are updated after every `step`, or every `epoch`."""
        for average in self.averages.values():
            if average.after == after:
                average.update()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights, optimizer moments and averages, by group and name."""
        weights = {name: value.detach() for name, value in self.parameters.items()}
        moments = optimizer_tensors(self.optimizer, self.parameters)
        averages = {name: average.average for name, average in self.averages.items()}
        return self._named({"weights": weights, "optimizer": moments, **averages})

    def values(self) -> dict[str, Any]:
        """What is not a tensor, for JSON."""
        steps = {f"{name}_steps": average.steps for name, average in self.averages.items()}
        return self._named({**asdict(self.counts), **steps})

    def load(self, tensors: Groups) -> None:
        """Takes a checkpoint's tensors, which are whole.

        Raises:
            CheckpointError: It holds other weights than are trained here.
        """
        self.use(tensors)
        load_optimizer(self.optimizer, self.parameters, tensors[self._key("optimizer")])

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Takes what `values` gave."""
        self.counts = UpdateCounts(**{name: values[self._key(name)] for name in asdict(UpdateCounts())})
        for name, average in self.averages.items():
            average.steps = values[self._key(f"{name}_steps")]

    @torch.no_grad()
    def use(self, tensors: Groups) -> None:
        """Takes weights and averages, whole.

        Raises:
            CheckpointError: They do not fit.
        """
        averages = {name: average.average for name, average in self.averages.items()}
        for group, targets in {"weights": self.parameters, **averages}.items():
            copy_saved(targets, tensors.get(self._key(group), {}), what=group)

    @torch.no_grad()
    def go_back(self, tensors: Groups) -> None:
        """Puts back in place copies of this process's parts of what `tensors` gave; gradients are dropped."""
        own = self.tensors()
        for group in self._named({"weights": (), **self.averages}):
            for name, value in own[group].items():
                local(value).copy_(tensors[group][name])
        reset_optimizer(self.optimizer, self.parameters, tensors[self._key("optimizer")])
        self.optimizer.zero_grad(set_to_none=True)

    def _key(self, name: str) -> str:
        return name if self.name == POLICY else f"{self.name}.{name}"

    def _named(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        return {self._key(name): entry for name, entry in entries.items()}
