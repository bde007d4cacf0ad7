"""What a denoising chain knows before any network runs: its noise grid and the coefficients of every step.

Each model family's forward marginal is x_k = a_k x_0 + s_k eps: a = sqrt(abar), s = sqrt(1 - abar) for VP models
(DDPM, Stable Diffusion), a = 1 - sigma, s = sigma for flow matching. One step of any sampler is then

    x_{k+1} ~ N(a_next * x0_hat + direction * eps_hat, std^2 I).

T is the number of steps; all tensors of a schedule have shape (T,).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Signal and noise levels at both ends of every step.

    The end of a step need not be the start of the next: with `timestep_spacing: linspace`, `DDIMScheduler` steps to
    t - N // T and is then called at another t. We follow it, since its images are what the model is known by.

    Attributes:
        a: Signal level at the start, (T,).
        s: Noise level at the start, (T,).
        a_next: Signal level at the end, (T,).
        s_next: Noise level at the end, (T,).
    """

    a: Tensor
    s: Tensor
    a_next: Tensor
    s_next: Tensor


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The coefficients of a chain of T Gaussian steps.

    Attributes:
        model_time: What the denoiser receives as its timestep, (T,).
        a: Signal level at the start of a step, (T,).
        s: Noise level at the start of a step, (T,).
        a_next: Signal level at its end, (T,).
        direction: Weight of the predicted noise in the mean, (T,).
        std: Standard deviation of the step, (T,), in latent units.
        stochastic: Whether std > 0, (T,) bool. Other steps have no density: likelihood-ratio gradients and KL leave
            them out, although the same weights make them.
        pretrained_steps: Indices of steps that the pretrained weights make, whatever is trained; none of them is
            stochastic.
        clip: Predicted x0 is clamped to [-clip, clip]; None for no clamping.
        consistent: Whether eps_hat is made to fit the clamped x0_hat, eps_hat = (x - a x0_hat) / s, at every step: as
            in DDPM's posterior, a function of x0_hat and x (DDIMScheduler's `use_clipped_model_output`).
    """

    model_time: Tensor
    a: Tensor
    s: Tensor
    a_next: Tensor
    direction: Tensor
    std: Tensor
    stochastic: Tensor
    pretrained_steps: tuple[int, ...] = ()
    clip: float | None = None
    consistent: bool = False

    @property
    def num_steps(self) -> int:
        """T, deterministic steps included."""
        return self.a.shape[0]

    @cached_property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Indices of the steps that have noise."""
        return tuple(torch.nonzero(self.stochastic).flatten().tolist())

    @property
    def unseen_steps(self) -> tuple[int, ...]:
        """Indices of the steps without noise that the trained weights make: no likelihood sees what they do there."""
        return tuple(k for k in range(self.num_steps) if k not in (*self.stochastic_steps, *self.pretrained_steps))

    @property
    def named_stochastic_steps(self) -> str:
        """Which steps have noise, for people: `all 10 steps`, `steps 0-8 of 10`, `steps 2, 5-6 of 10`, `no step of 10`.

        A KL that is reported is that of these steps.
        """
        steps, count = self.stochastic_steps, self.num_steps
        if len(steps) == count:
            return f"all {count} steps"
        starts = [k for k in steps if k - 1 not in steps]
        ends = [k for k in steps if k + 1 not in steps]
        ranges = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
        if not steps:
            return f"no step of {count}"
        return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(ranges)} of {count}"

    def noised(self, k: int | Tensor, clean: Tensor, eps: Tensor) -> Tensor:
        """A state x_k of the forward process, a_k clean + s_k eps.

        Args:
            k: Step at whose start it stands, an int or (B,) int64.
            clean: Clean latents, (B, *latent).
            eps: Standard normal noise, (B, *latent).
        """
        return coefficient(self.a, k, clean) * clean + coefficient(self.s, k, clean) * eps

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Schedule":
        """The same schedule on another device; `dtype` applies to the coefficients, not to `model_time`."""
        return Schedule(
            model_time=self.model_time.to(device),
            a=self.a.to(device, dtype),
            s=self.s.to(device, dtype),
            a_next=self.a_next.to(device, dtype),
            direction=self.direction.to(device, dtype),
            std=self.std.to(device, dtype),
            stochastic=self.stochastic.to(device),
            pretrained_steps=self.pretrained_steps,
            clip=self.clip,
            consistent=self.consistent,
        )


def coefficient(values: Tensor, k: int | Tensor, x: Tensor) -> Tensor:
    """The coefficients (T,) of step k in the precision of x, broadcastable to it: (B or 1, 1, ...)."""
    return values[k].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
