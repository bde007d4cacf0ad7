"""Samplers: how much noise each step adds, and how its mean makes room for it.

A sampler is a rule for std and for the weight of the predicted noise (`direction`), given a step's two ends
(a, s) -> (a', s'):

    exact rule  direction = sqrt(s'^2 - std^2)      keeps the marginals a' x0 + s' eps for a perfect network
    euler rule  direction = s' - std^2 / (2 s)      one Euler-Maruyama step of the reverse SDE (flow matching)

| kind      | std                                       | rule  | source                                           |
|-----------|-------------------------------------------|-------|--------------------------------------------------|
| ddim      | eta sqrt((s'^2/s^2)(1 - a^2/a'^2))        | exact | Song et al., arXiv:2010.02502, eq. 16            |
| ode       | 0                                         | exact | the same at eta = 0; Euler for flow matching     |
| cps       | s' sin(eta pi/2)                          | exact | Flow-CPS, arXiv:2509.05952                       |
| flow_sde  | eta sqrt(s/(1-s)) sqrt(s-s')              | euler | Flow-GRPO, arXiv:2505.05470, eq. 9               |
| dance_sde | eta sqrt(s-s')                            | euler | DanceGRPO, arXiv:2505.07818                      |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ddpo.schedule import Grid, Schedule, is_flow_matching
from ddpo.validation import check

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SamplerKind = Literal["ddim", "ode", "flow_sde", "dance_sde", "cps"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are sampled.

    Attributes:
        kind: `ddim` for VP models (eta = 1 is DDPM's ancestral sampling); `flow_sde`, `dance_sde`, `cps` for flow
            matching; `ode` for both, without noise.
        num_steps: Denoising steps T.
        eta: Noise level, 0 for none.
        guidance_scale: Classifier-free guidance; 1 for none.
        height: Image height in pixels; None takes the pipeline's own.
        width: Image width in pixels; None takes the pipeline's own.
        num_frames: Frames of a video pipeline; None takes the pipeline's own.
        guidance_rescale: How far guided outputs are brought back to the spread of the conditional ones, in [0, 1]
            (Lin et al., arXiv:2305.08891, section 3.4), for pipelines that offer it (Stable Diffusion, SDXL).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: SamplerKind = "ddim"
    num_steps: int = 50
    eta: float = 1.0
    guidance_scale: float = 5.0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        check(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        check(0 <= self.eta <= 1, "eta", self.eta, "in [0, 1]")
        check(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "at least 0")
        for name, pixels in (("height", self.height), ("width", self.width)):
            check(pixels is None or pixels >= 8, name, pixels, "at least 8 pixels or null")
        check(self.num_frames is None or self.num_frames >= 1, "num_frames", self.num_frames, "at least 1 or null")
        check(0 <= self.guidance_rescale <= 1, "guidance_rescale", self.guidance_rescale, "in [0, 1]")


def default_sampler(
    scheduler: "SchedulerMixin", *, num_steps: int = 50, guidance_scale: float = 5.0, kind: SamplerKind | None = None
) -> SamplerConfig:
    """The sampler that fits a pipeline's scheduler: ancestral DDIM for VP models, Flow-GRPO's SDE for flow matching.

    Args:
        scheduler: The pipeline's own.
        num_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        kind: Take this kind instead; the noise level is still the model family's.
    """
    flow = is_flow_matching(scheduler)
    return SamplerConfig(
        kind=kind or ("flow_sde" if flow else "ddim"),
        eta=0.7 if flow else 1.0,  # 0.7 is Flow-GRPO's noise level (arXiv:2505.05470)
        num_steps=num_steps,
        guidance_scale=guidance_scale,
    )


def ddim_std(grid: Grid, eta: float) -> Tensor:
    """DDIM's noise level, (T,); eta = 1 is DDPM's ancestral sampling with the small variance."""
    variance = (grid.s_next / grid.s) ** 2 * (1 - (grid.a / grid.a_next) ** 2)
    return eta * variance.clamp(min=0).sqrt()


def cps_std(grid: Grid, eta: float) -> Tensor:
    """Coefficients-preserving sampling's noise level, (T,)."""
    return grid.s_next * math.sin(eta * math.pi / 2)


def flow_sde_std(grid: Grid, eta: float) -> Tensor:
    """Flow-GRPO's noise level, (T,). At s = 1, where 1 - s vanishes, the level of the step's end stands in there."""
    level = torch.where(grid.s < 1, grid.s, grid.s_next)
    return eta * (grid.s / (1 - level)).sqrt() * (grid.s - grid.s_next).sqrt()


def dance_sde_std(grid: Grid, eta: float) -> Tensor:
    """DanceGRPO's constant noise level times the square root of the step, (T,)."""
    return eta * (grid.s - grid.s_next).sqrt()


def ode_std(grid: Grid, eta: float) -> Tensor:
    """No noise, (T,)."""
    return torch.zeros_like(grid.s)


def exact_direction(grid: Grid, std: Tensor) -> Tensor:
    """Weight of the predicted noise that leaves the total noise at s', (T,)."""
    return (grid.s_next**2 - std**2).clamp(min=0).sqrt()


def euler_direction(grid: Grid, std: Tensor) -> Tensor:
    """Weight of the predicted noise of an Euler-Maruyama step, (T,). The last step (s' = 0) is noise-free there."""
    return grid.s_next - std**2 / (2 * grid.s)


_Rule = tuple[Callable[[Grid, float], Tensor], Callable[[Grid, Tensor], Tensor]]
RULES: dict[SamplerKind, _Rule] = {
    "ddim": (ddim_std, exact_direction),
    "ode": (ode_std, exact_direction),
    "cps": (cps_std, exact_direction),
    "flow_sde": (flow_sde_std, euler_direction),
    "dance_sde": (dance_sde_std, euler_direction),
}
FLOW_ONLY: tuple[SamplerKind, ...] = ("flow_sde", "dance_sde", "cps")


def make_schedule(
    config: SamplerConfig, grid: Grid, *, model_time: Tensor, is_flow: bool, clip: float | None
) -> Schedule:
    """The coefficients of every step, in float64.

    Args:
        config: Sampler and noise level.
        grid: Noise levels of the chain, float64.
        model_time: What the denoiser receives at each step, (T,).
        is_flow: Whether the grid is that of a flow-matching model.
        clip: Bound on the predicted x0, or None.

    Raises:
        ValueError: The sampler does not fit the model family.
    """
    fitting = ("ode", *FLOW_ONLY) if is_flow else ("ddim", "ode")
    if config.kind not in fitting:
        family = "flow-matching" if is_flow else "VP"
        raise ValueError(f"sampler.kind {config.kind!r} does not fit a {family} model; use one of {', '.join(fitting)}")
    std_rule, direction_rule = RULES[config.kind]
    std = std_rule(grid, config.eta)
    # A last step that ends at s' = 0 has std 0 under every rule with a density of its own there, or none.
    std = torch.where(grid.s_next > 0, std, torch.zeros_like(std))
    return Schedule(
        model_time=model_time,
        a=grid.a,
        s=grid.s,
        a_next=grid.a_next,
        direction=direction_rule(grid, std),
        std=std,
        stochastic=std > 0,
        clip=clip,
    )
