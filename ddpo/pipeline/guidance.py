"""Classifier-free guidance: how a pipeline calls its denoiser for it, and how it combines what comes back.

A rule is found, not chosen. The hollow denoiser returns known numbers, other ones for each branch; what the pipeline
hands its scheduler for them is compared with every product of

    layout   which calls are made, and where the branches are in them
    line     a point on the line through n and p
    finish   the norm, the spread or some channels of p restored, the half of the channels that is a learned variance
             dropped, the sign

and the products that give the same numbers are kept: no network runs for that, and branches are never equal by chance.
A real step of the pipeline then tells those apart that are equal here.

B is the batch, `latent` the latent shape; p is the conditional output, n the unconditional one, w the scale.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ddpo.pipeline.tracing import Step, UntraceableError

Layout = Literal["single", "stacked", "stacked_positive_first", "positive_first", "negative_first"]
SHAPES: dict[Layout, tuple[int, int]] = {  # (calls a step, rows a sample and call)
    "single": (1, 1), "stacked": (1, 2), "stacked_positive_first": (1, 2), "positive_first": (2, 1),
    "negative_first": (2, 1),
}  # fmt: skip
NAMES: dict[Layout, str] = {
    "single": "none", "stacked": "stacked", "stacked_positive_first": "stacked positive first",
    "positive_first": "two calls, positive first", "negative_first": "two calls, negative first",
}  # fmt: skip
Combine = Callable[[Tensor | None, Tensor, float], Tensor]
Line = Callable[[Tensor, Tensor, float], Tensor]
ROUNDING = {torch.float32: 16}  # units in the last place of the largest entry: another order of the same sum


@dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """One way to guide.

    Attributes:
        name: For messages.
        layout: `single` is one call on the positive condition; `stacked` one call on [negative, positive] rows, or in
            the other order; the other two are two calls, in that order.
        combine: (negative, positive, scale) -> guided output, all (B, *latent); negative is None for `single`. Of two
            equal branches it is the model output without guidance.
    """

    name: str
    layout: Layout
    combine: Combine

    @property
    def branches(self) -> int:
        """Denoiser rows of a latent: 2 where both branches are computed."""
        return math.prod(SHAPES[self.layout])

    def split(self, outputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
        """The outputs of the (negative, positive) branch among those of a step's calls."""
        match self.layout:
            case "single":
                return None, outputs[0]
            case "stacked":
                negative, positive = outputs[0].chunk(2)
            case "stacked_positive_first":
                positive, negative = outputs[0].chunk(2)
            case "positive_first":
                positive, negative = outputs
            case "negative_first":
                negative, positive = outputs
        return negative, positive


def linear(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """Extrapolates from n: n + w (p - n) (Ho and Salimans, arXiv:2207.12598, eq. 6 with scale = 1 + w)."""
    assert negative is not None, "a rule with two branches"
    return negative + scale * (positive - negative)


def _from_positive(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    return positive + scale * (positive - negative)


def _from_positive_less_one(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    return positive + (scale - 1) * (positive - negative)


def _weighted(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    return (scale + 1) * positive - scale * negative


def _weighted_less_one(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    return scale * positive + (1 - scale) * negative


# Lines that w = 1 leaves at p, and those that w = 0 does; the same line twice where another order rounds otherwise.
LINES: dict[str, Line] = {
    "": linear,
    "from positive": _from_positive,  # Z-Image, Krea 2
    "weighted": _weighted,  # Kandinsky 3: (w + 1) p - w n
    "from positive less one": _from_positive_less_one,
    "weighted less one": _weighted_less_one,
}


def norm_preserving(guided: Tensor, positive: Tensor) -> Tensor:
    """Brought back to the norm of p, token by token over the last axis (Qwen-Image, Lumina 2)."""
    return guided * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))


def norm_capped(guided: Tensor, positive: Tensor) -> Tensor:
    """The same where guidance made it longer; never made longer itself (LongCat)."""
    ratio = torch.norm(positive, dim=-1, keepdim=True) / (torch.norm(guided, dim=-1, keepdim=True) + 1e-8)
    return guided * ratio.clamp(max=1.0)


def first_channels(guided: Tensor, positive: Tensor) -> Tensor:
    """Guided in three channels alone, as if they were RGB (Lumina; first in DiT's code)."""
    return torch.cat([guided[:, :3], positive[:, 3:]], dim=1)


@dataclass(frozen=True)
class Rescaled:
    """Partly brought back to the spread of p (Lin et al., arXiv:2305.08891, eq. 15 and 16).

    Attributes:
        rescale: How far, in [0, 1].
    """

    rescale: float

    def __call__(self, guided: Tensor, positive: Tensor) -> Tensor:
        """The rescaled output, (B, *latent)."""
        axes = list(range(1, guided.ndim))
        spread = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        return self.rescale * (guided * spread) + (1 - self.rescale) * guided


@dataclass(frozen=True, kw_only=True)
class Product:
    """A line and its finish, as a `Combine`; two of the same parts are equal.

    Attributes:
        line: None for the conditional output alone.
        restore: Of (guided, positive); None for nothing.
        halved: Whether the second half of the channels is dropped.
        sign: 1 or -1.
    """

    line: Line | None
    restore: Callable[[Tensor, Tensor], Tensor] | None
    halved: bool
    sign: int

    def __call__(self, negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
        """The guided output, (B, *latent)."""
        guided = positive
        if self.line is not None:
            assert negative is not None, "a rule with two branches"
            guided = self.line(negative, positive, scale)
        if self.restore is not None:
            guided = self.restore(guided, positive)
        if self.halved:
            guided = guided.chunk(2, dim=1)[0]
        return guided if self.sign > 0 else -guided


def rules(*, rescale: float = 0.0) -> Iterator[GuidanceRule]:
    """All rules, the usual ones first.

    Args:
        rescale: What the pipeline is given as `guidance_rescale`; above 0, guided outputs may be rescaled.
    """
    restores: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {"": None}
    if rescale > 0:
        restores["rescaled"] = Rescaled(rescale)
    restores["norm preserving"] = norm_preserving
    restores["norm capped"] = norm_capped
    restores["three channels"] = first_channels
    for layout in SHAPES:
        alone = layout == "single"
        for line_name, line in ({"": None} if alone else LINES).items():
            for restore_name, restore in ({"": None} if alone else restores).items():
                for halved in (False, True):
                    for sign in (1, -1):
                        parts = [line_name, restore_name, "learned variance" * halved, "negated" * (sign < 0)]
                        yield GuidanceRule(
                            name=", ".join([NAMES[layout], *filter(None, parts)]),
                            layout=layout,
                            combine=Product(line=line, restore=restore, halved=halved, sign=sign),
                        )


def unguided(rule: GuidanceRule) -> GuidanceRule:
    """The same pipeline's conditional prediction: what the rule makes of two equal branches."""
    return GuidanceRule(name="unguided", layout="single", combine=lambda _, p, scale: rule.combine(p, p, 1.0))


def find_rules(step: Step, outputs: Sequence[Tensor], scale: float, *, rescale: float = 0.0) -> list[GuidanceRule]:
    """The guidance rules that make the pipeline's model output of its denoiser's outputs, the nearest and usual first.

    Args:
        step: One recorded step.
        outputs: What its denoiser calls returned for the noisy latents, as the pipeline guides with it.
        scale: Guidance as the pipeline defines it.
        rescale: As for `rules`.

    Raises:
        UntraceableError: None does.
    """
    calls, rows = len(step.calls), step.calls[0].latents.shape[0] // step.sample.shape[0]
    target = step.model_output
    errors: list[tuple[float, GuidanceRule]] = []
    for rule in rules(rescale=rescale):
        if SHAPES[rule.layout] != (calls, rows):
            continue
        output = rule.combine(*rule.split(outputs), scale)
        if output.shape != target.shape:
            continue
        error = float((output - target).abs().max())
        errors.append((error, rule))
    fitting = [(error, rule) for error, rule in errors if error <= rounding(target)]
    if fitting:
        return [rule for _, rule in sorted(fitting, key=lambda pair: pair[0])]
    nearest, best = min(errors, key=lambda pair: pair[0], default=(0.0, None))
    known = f"; the nearest rule, {best.name}, is off by {nearest:.2g}" if best else ""
    raise UntraceableError(
        f"the pipeline's guidance is none that can be reproduced: of {calls} denoiser call(s) of {rows} row(s) a "
        f"sample it makes a model output of shape {tuple(target.shape)} in a way of its own{known}. Without guidance "
        "(sampler.guidance_scale 1, or 0 where the pipeline counts from there) it may be trained"
    )


def rounding(value: Tensor) -> float:
    """By how much two orders of the same computation may differ, in the precision of a value and in its unit."""
    return ROUNDING.get(value.dtype, 2) * torch.finfo(value.dtype).eps * max(1.0, float(value.abs().max()))
