"""The rewards as objectives differentiate them, and what is said where a gradient is not finite.

A reward whose gradient is NaN or infinite spoils the gradient of the whole update, which is then skipped and counted
(`trainers.epoch.step_rules`); here it is named, with the prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rewards import WeightedSum
from trainers.parallel.processes import Processes
from trainers.tracking.progress import Progress


class ScoreGradient:
    """The total of the differentiable rewards with its graph (`ddpo.objectives.Models.score`)."""

    def __init__(
        self, reward: WeightedSum, *, epoch: Callable[[], int], processes: Processes, progress: Progress
    ) -> None:
        """Takes what a run scores with.

        Args:
            reward: Its running scales are read.
            epoch: Finished epochs, which set scheduled weights.
            processes: Who shares the run.
            progress: Where what is found is said.
        """
        self._reward, self._epoch, self._processes, self._progress = reward, epoch, processes, progress
        self._found: dict[str, str] = {}

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Tensor:
        """The total, (N,), of images (N, 3, H, W) in [0, 1]."""
        watch = partial(self._watch, tuple(prompts))
        return self._reward.gradient_total(images, prompts, metadata, epoch=self._epoch(), watch=watch)

    def tell(self, then: str = "this update is skipped") -> None:
        """Names what has been found since the last time; called on every process after every backward pass.

        Args:
            then: What becomes of it.
        """
        if self._processes.largest(bool(self._found)):
            everyones = [found for found in self._processes.gather_json(self._found) if isinstance(found, dict)]
            for name, prompt in {name: prompt for found in everyones for name, prompt in found.items()}.items():
                self._progress.line(f"the gradient of reward {name!r} is not finite for the prompt {prompt!r}: {then}")
        self._found.clear()

    def _watch(self, prompts: Sequence[str], name: str, gradient: Tensor) -> None:
        finite = torch.isfinite(gradient).flatten(1).all(1)
        if not bool(finite.all()):
            self._found.setdefault(name, prompts[int((~finite).nonzero()[0])])
