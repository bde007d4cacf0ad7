"""Puts the images of a prompt together again when they were sampled in different batches.

A reward that compares the images of a group needs the whole group at once. Samples come in order, the G images of a
group next to each other, in batches of any size: what is complete is handed on, the rest waits for the next batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Metadata = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images to be scored together.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        prompts: B texts.
        metadata: B dictionaries.
        groups: B ids, equal within a group; None where groups do not matter.
        start: Number of the first image among all that the buffer was given.
    """

    images: Tensor
    prompts: Sequence[str]
    metadata: Sequence[Metadata]
    groups: Sequence[int] | None
    start: int


class GroupBuffer:
    """Holds images back until their group is complete."""

    def __init__(self, group_size: int) -> None:
        """Starts empty.

        Args:
            group_size: Images of a group, G; 1 hands every batch on as it is.
        """
        self._size = group_size
        self._start = 0
        self._images: list[Tensor] = []
        self._prompts: list[str] = []
        self._metadata: list[Metadata] = []

    def add(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> list[ImageBatch]:
        """Takes a batch and returns the groups that are complete now, as one batch, or none."""
        start = self._start
        if self._size == 1:
            self._start += len(prompts)
            return [ImageBatch(images=images, prompts=prompts, metadata=metadata, groups=None, start=start)]
        self._images.append(images)
        self._prompts += prompts
        self._metadata += metadata
        complete = len(self._prompts) // self._size * self._size
        if complete == 0:
            return []
        waiting = torch.cat(self._images)
        batch = ImageBatch(
            images=waiting[:complete],
            prompts=self._prompts[:complete],
            metadata=self._metadata[:complete],
            groups=[i // self._size for i in range(complete)],
            start=start,
        )
        self._start += complete
        self._images, self._prompts = [waiting[complete:]], self._prompts[complete:]
        self._metadata = self._metadata[complete:]
        return [batch]
