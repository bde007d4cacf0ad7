"""The optimizer's keys: AdamW's, and those of a trust region."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, TypeVar

from ddpo.validation import check

Number = TypeVar("Number", int, float)

PROBES = 4
"""Random vectors an update of which the Fisher matrix's diagonal is estimated."""

_TRUST_REGION = ("radius", "damping", "cg_iterations", "fisher_fraction", "preconditioner", "backtracks")
_ADAMW = (
    "eight_bit", "learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm", "schedule",
    "schedule_epochs", "final_rate", "warmup_updates",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """From gradients to new weights: AdamW, or steps of a given length in nats.

    Attributes:
        kind: `adamw`; `natural_gradient`, the gradient in the metric of the KL, each update as long as `radius`;
            `trpo`, the same with a search back along the step until the exact KL is within it and the surrogate gains.
            The last two take objectives whose units are denoising steps with noise.
        radius: Mean KL of a step's distribution from before an update to after it, nats; null takes 0.01.
        damping: Share of the metric that is added to the Fisher matrix before it is inverted; null takes 0.1.
        cg_iterations: Conjugate gradient iterations an update, at most; null takes 10.
        fisher_fraction: Share of an update's denoising steps on which the Fisher matrix and the KL are measured, 1 over
            a whole number; null takes 0.25.
        preconditioner: `diagonal` measures weights by a running estimate of the Fisher matrix's diagonal, in conjugate
            gradients and in the damping; `none` by their own size.
        backtracks: Of `trpo`: shorter steps that are tried before an update is given up; null takes 8.
        eight_bit: Keep the averages of gradients in 8 bits (bitsandbytes): 2 bytes a trained weight instead of 8.
        learning_rate: Peak step size; null takes 3e-4 for LoRA, 1e-5 for all weights.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        epsilon: Added to the denominator.
        weight_decay: Decoupled weight decay.
        max_grad_norm: The gradient is scaled down to this norm when it is longer.
        schedule: Course of the learning rate after the warm-up, over the run's optimizer steps, or over its time where
            `max_minutes` ends it first.
        schedule_epochs: Epochs that the schedule takes; null for those of the run, so that a resume with more of them
            makes it longer and the rate goes up again.
        final_rate: Share of the peak rate where the schedule ends, and that later epochs keep.
        warmup_updates: Optimizer steps over which the rate rises linearly from 0.
        ema_decay: Decay of the moving average of the weights that is evaluated and exported; 0 takes the last weights.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["adamw", "natural_gradient", "trpo"] = "adamw"
    radius: float | None = None
    damping: float | None = None
    cg_iterations: int | None = None
    fisher_fraction: float | None = None
    preconditioner: Literal["none", "diagonal"] = "none"
    backtracks: int | None = None
    eight_bit: bool = False
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_epochs: int | None = None
    final_rate: float = 0.0
    warmup_updates: int = 0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        check(rate is None or 0 < rate <= 1, "learning_rate", rate, "positive and at most 1, or null")
        epochs = self.schedule_epochs
        check(epochs is None or epochs >= 1, "schedule_epochs", epochs, "at least 1 or null")
        check(0 <= self.final_rate <= 1, "final_rate", self.final_rate, "in [0, 1]")
        for name in ("beta1", "beta2", "ema_decay"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("epsilon", "max_grad_norm"):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("weight_decay", "warmup_updates"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("epsilon", "weight_decay"):
            value = getattr(self, name)
            check(value is None or value < math.inf, name, value, "finite")
        self._check_trust_region()

    def _check_trust_region(self) -> None:
        """Keys of the other kinds are refused, as nothing would read them."""
        chosen = f"with optimizer.kind: {self.kind}"
        own = {field.name: field.default for field in fields(self)}
        unread = _ADAMW if self.is_trust_region else _TRUST_REGION
        for name in unread if self.kind != "natural_gradient" else (*unread, "backtracks"):
            value, default = getattr(self, name), own[name]
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            check(value == default, name, value, f"{shown}, its default, {chosen} (nothing would read it)")
        for name in ("radius", "damping"):
            value = getattr(self, name)
            check(value is None or 0 < value < math.inf, name, value, "positive, or null")
        check((self.radius or 0.0) <= 100, "radius", self.radius, "at most 100 nats a step")
        for name in ("cg_iterations", "backtracks"):
            check((value := getattr(self, name)) is None or value >= 1, name, value, "at least 1, or null")
        share = self.fisher_fraction
        check(share is None or 0 < share <= 1, "fisher_fraction", share, "in (0, 1], or null")

    @property
    def is_trust_region(self) -> bool:
        """Whether steps have a length in nats."""
        return self.kind != "adamw"

    @property
    def region(self) -> "TrustRegion":
        """What a trust region is told, with defaults filled in."""
        return TrustRegion(
            radius=_or(self.radius, 0.01),
            damping=_or(self.damping, 0.1),
            cg_iterations=_or(self.cg_iterations, 10),
            stride=round(1 / _or(self.fisher_fraction, 0.25)),
            diagonal=self.preconditioner == "diagonal",
            backtracks=_or(self.backtracks, 8) if self.kind == "trpo" else 0,
        )


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """A trust region's keys without nulls.

    Attributes:
        radius: Nats a step.
        damping: Share of the metric.
        cg_iterations: At most.
        stride: Every so-manieth of an update's denoising steps is measured.
        diagonal: Whether weights are measured by the diagonal of the Fisher matrix.
        backtracks: Shorter steps that are tried; 0 for no search.
    """

    radius: float
    damping: float
    cg_iterations: int
    stride: int
    diagonal: bool
    backtracks: int


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
