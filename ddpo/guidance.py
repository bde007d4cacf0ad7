"""Classifier-free guidance: how a pipeline calls its denoiser for it, and how it combines what comes back.

A rule is found, not chosen: at load time the stock pipeline's own model output is compared with each rule's, and the
one that reproduces it exactly is kept (`find_rule`). A pipeline with a combination of its own needs one more row in
`RULES`.

B is the batch, `latent` the latent shape; p is the conditional output, n the unconditional one, w the scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ddpo.tracing import Step, UntraceableError

Layout = Literal["single", "stacked", "stacked_positive_first", "positive_first", "negative_first"]
SHAPES: dict[Layout, tuple[int, int]] = {  # (calls a step, rows a sample and call)
    "single": (1, 1), "stacked": (1, 2), "stacked_positive_first": (1, 2), "positive_first": (2, 1),
    "negative_first": (2, 1),
}  # fmt: skip
Combine = Callable[[Tensor | None, Tensor, float], Tensor]


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


def no_guidance(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """The conditional output as it is."""
    return positive


def negated(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """The negative of p, of a network that predicts the velocity towards the data."""
    return -positive


def linear(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """Extrapolates from n: n + w (p - n) (Ho and Salimans, arXiv:2207.12598, eq. 6 with scale = 1 + w)."""
    assert negative is not None, "a rule with two branches"
    return negative + scale * (positive - negative)


def negated_from_positive(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """-(p + w (p - n)): the same line counted from p, so that w = 0 is no guidance (Z-Image)."""
    assert negative is not None, "a rule with two branches"
    return -(positive + scale * (positive - negative))


def norm_preserving(negative: Tensor | None, positive: Tensor, scale: float) -> Tensor:
    """Linear guidance brought back to the norm of p, token by token over the last axis (Qwen-Image)."""
    guided = linear(negative, positive, scale)
    return guided * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))


def rescaled(negative: Tensor | None, positive: Tensor, scale: float, *, rescale: float) -> Tensor:
    """Linear guidance, partly brought back to the spread of p (Lin et al., arXiv:2305.08891, eq. 15 and 16)."""
    guided = linear(negative, positive, scale)
    axes = list(range(1, guided.ndim))
    spread = positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return rescale * (guided * spread) + (1 - rescale) * guided


def first_half(negative: Tensor | None, positive: Tensor, scale: float, *, combine: Combine = linear) -> Tensor:
    """Another rule for a network whose second half of channels is a learned variance, which is dropped."""
    return combine(negative, positive, scale).chunk(2, dim=1)[0]


RULES: tuple[GuidanceRule, ...] = (
    GuidanceRule(name="none", layout="single", combine=no_guidance),
    GuidanceRule(name="none, learned variance", layout="single", combine=partial(first_half, combine=no_guidance)),
    GuidanceRule(name="none, negated", layout="single", combine=negated),
    GuidanceRule(name="stacked", layout="stacked", combine=linear),
    GuidanceRule(name="stacked, learned variance", layout="stacked", combine=first_half),
    GuidanceRule(name="stacked positive first, negated", layout="stacked_positive_first",
                 combine=negated_from_positive),
    GuidanceRule(name="two calls, positive first", layout="positive_first", combine=linear),
    GuidanceRule(name="two calls, positive first, norm preserving", layout="positive_first", combine=norm_preserving),
    GuidanceRule(name="two calls, negative first", layout="negative_first", combine=linear),
)  # fmt: skip


def rules(*, rescale: float = 0.0) -> tuple[GuidanceRule, ...]:
    """The rules to try.

    Args:
        rescale: What the pipeline is given as `guidance_rescale`; above 0, linear rules may rescale.
    """
    if rescale == 0:
        return RULES
    combine = partial(rescaled, rescale=rescale)
    return (*RULES, *(
        GuidanceRule(name=f"{rule.name}, rescaled", layout=rule.layout, combine=combine)
        for rule in RULES if rule.combine is linear
    ))  # fmt: skip


def unguided(rule: GuidanceRule) -> GuidanceRule:
    """The same pipeline's conditional prediction: what the rule makes of two equal branches."""
    return GuidanceRule(name="unguided", layout="single", combine=lambda _, p, scale: rule.combine(p, p, 1.0))


def find_rule(
    step: Step, denoise: Callable[[GuidanceRule, Step], Tensor], candidates: Sequence[GuidanceRule] = RULES
) -> GuidanceRule:
    """The guidance rule that reproduces the pipeline's own model output exactly.

    Args:
        step: One recorded step of the real loop (`hollow=False`).
        denoise: Computes the model output of that step under a rule.
        candidates: The rules to try, in this order.

    Raises:
        UntraceableError: None does; the message shows each rule's error.
    """
    errors = {}
    calls, rows = len(step.calls), step.calls[0].latents.shape[0] // step.sample.shape[0]
    for rule in candidates:
        if SHAPES[rule.layout] != (calls, rows):
            continue
        output = denoise(rule, step)
        if output.shape != step.model_output.shape:
            errors[rule.name] = f"shape {tuple(output.shape)}"
            continue
        error = float((output - step.model_output).abs().max())
        if error == 0.0:
            return rule
        errors[rule.name] = f"max error {error:.2e}"
    raise UntraceableError(
        "no guidance rule reproduces this pipeline's model output of shape "
        f"{tuple(step.model_output.shape)} from {calls} denoiser call(s) of {rows} row(s) a sample: "
        + ("; ".join(f"{name}: {text}" for name, text in errors.items()) or "no layout fits")
        + ". Add its rule to ddpo.guidance.RULES."
    )
