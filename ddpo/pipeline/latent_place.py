"""Where the noisy latents are in what a denoiser is given.

Most networks are given the latents as the scheduler steps them. Some are given more on one axis: the tokens of an input
image after the noisy ones (FLUX Kontext), its latents or a mask in channels beside them (image to video). Some want an
axis of size 1 more. `rows` is the number of rows of a call, `latent` the latent shape.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.pipeline.tracing import Step, UntraceableError

BESIDE = "what stands beside the noise"  # as an argument's name, which no denoiser has


@dataclass(frozen=True, kw_only=True)
class LatentPlace:
    """Where the latents are in a denoiser's first argument.

    Attributes:
        axis: Where something stands beside them, counted with the rows; None for nothing.
        start: Index of the first noisy entry on that axis.
        size: How many are noisy.
        extra_axis: Where an axis of size 1 is that the scheduler's latents lack; None for nowhere.
    """

    axis: int | None = None
    start: int = 0
    size: int = 0
    extra_axis: int | None = None

    def beside(self, given: Tensor) -> Tensor:
        """What stands beside the noise, before and after it in this order, with its axis moved to 1; (rows, n, ...)."""
        assert self.axis is not None, "something stands beside the noise"
        before = given.narrow(self.axis, 0, self.start)
        end = self.start + self.size
        after = given.narrow(self.axis, end, given.shape[self.axis] - end)
        return torch.cat([before, after], dim=self.axis).movedim(self.axis, 1)

    def noisy(self, given: Tensor) -> Tensor:
        """The latents alone, (rows, *latent), of what has the form of a denoiser's input or output."""
        if self.axis is not None and given.shape[self.axis] > self.size:
            given = given.narrow(self.axis, self.start, self.size)
        return given if self.extra_axis is None else given.squeeze(self.extra_axis)

    def given(self, latents: Tensor, beside: Tensor | None) -> Tensor:
        """What the denoiser is given for latents (rows, *latent) and what stands beside them."""
        if self.extra_axis is not None:
            latents = latents.unsqueeze(self.extra_axis)
        if self.axis is None:
            return latents
        assert beside is not None, "something stands beside the noise"
        others = beside.to(latents.dtype).movedim(1, self.axis)
        rest = others.shape[self.axis] - self.start
        before, after = others.narrow(self.axis, 0, self.start), others.narrow(self.axis, self.start, rest)
        return torch.cat([before, latents, after], dim=self.axis)


def find_place(step: Step) -> LatentPlace:
    """Finds the scheduler's latents in what the denoiser was given for them.

    Raises:
        UntraceableError: They are not there as they are.
    """
    given, sample = step.calls[0].latents, step.sample
    seen, stepped = tuple(given.shape[1:]), tuple(sample.shape[1:])
    place = None
    if seen == stepped:
        place = LatentPlace()
    elif len(seen) == len(stepped):
        place = _beside(given, sample)
    else:
        axes = [axis for axis in range(len(seen)) if seen[axis] == 1 and seen[:axis] + seen[axis + 1 :] == stepped]
        if axes:
            place = LatentPlace(extra_axis=axes[0] + 1)
    if place is None or not _holds(place, given, sample):
        raise UntraceableError(
            f"the denoiser is given {seen} where the scheduler steps {stepped}, and the scheduler's latents are not in "
            "there as they are: they are scaled, or mixed with an image"
        )
    return place


def _beside(given: Tensor, sample: Tensor) -> LatentPlace | None:
    """The place on the one axis on which the denoiser is given more, at its beginning or at its end."""
    longer = [axis for axis in range(1, given.ndim) if given.shape[axis] != sample.shape[axis]]
    if len(longer) != 1 or given.shape[longer[0]] < sample.shape[longer[0]]:
        return None
    (axis,), size = longer, sample.shape[longer[0]]
    for start in (0, given.shape[axis] - size):
        place = LatentPlace(axis=axis, start=start, size=size)
        if _holds(place, given, sample):
            return place
    return None


def _holds(place: LatentPlace, given: Tensor, sample: Tensor) -> bool:
    """Whether the scheduler's latents are there, once for each branch."""
    noisy = place.noisy(given)
    if noisy.shape[0] % sample.shape[0]:
        return False
    return all(torch.equal(rows, sample.to(rows.dtype)) for rows in noisy.split(sample.shape[0]))
