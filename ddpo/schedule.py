"""What a denoising chain knows before any network runs: its noise grid and the coefficients of every step.

Each model family's forward marginal is x_k = a_k x_0 + s_k eps: a = sqrt(abar), s = sqrt(1 - abar) for VP models
(DDPM, Stable Diffusion), a = 1 - sigma, s = sigma for flow matching. One step of any sampler is then

    x_{k+1} ~ N(a_next * x0_hat + direction * eps_hat, std^2 I).

T is the number of steps; all tensors of a schedule have shape (T,).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:  # diffusers takes seconds to import, and the formulas here do not need it
    from diffusers import SchedulerMixin

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
        stochastic: Whether std > 0, (T,) bool. Other steps are no decisions of the policy: part of the environment.
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
    clip: float | None = None
    consistent: bool = False

    @property
    def num_steps(self) -> int:
        """T, deterministic steps included."""
        return self.a.shape[0]

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Indices of the steps that are decisions of the policy."""
        return tuple(int(k) for k in torch.nonzero(self.stochastic).flatten())

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
            clip=self.clip,
            consistent=self.consistent,
        )


def is_flow_matching(scheduler: "SchedulerMixin") -> bool:
    """Whether a scheduler is diffusers' flow-matching Euler, the one that flow-matching models are sampled by here."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def training_scheduler(scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """The scheduler whose grid and prediction type the policy follows.

    Any VP scheduler (PNDM, Euler, DPM-Solver, ...) becomes the `DDIMScheduler` of the same noise schedule, since DDIM
    is the family of one-step Gaussian samplers of a VP model. Flow-matching schedulers stay.

    Args:
        scheduler: The pipeline's own.

    Returns:
        A `DDIMScheduler` or the given `FlowMatchEulerDiscreteScheduler`.

    Raises:
        ValueError: The scheduler has neither `alphas_cumprod` nor flow-matching sigmas, is a VP solver set up for flow
            matching, or thresholds x0 dynamically.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if is_flow_matching(scheduler):
        return scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no alphas_cumprod and is not FlowMatchEulerDiscreteScheduler: "
            "its noise schedule is unknown. Give the pipeline a DDIMScheduler or a FlowMatchEulerDiscreteScheduler."
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample") or scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} with prediction_type {kind!r} runs a flow-matching model with a "
            "VP solver; give the pipeline a FlowMatchEulerDiscreteScheduler"
        )
    overrides: dict[str, object] = {}
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        # Solvers without these two options never clip, but DDIMScheduler's own default would clip latents to [-1, 1].
        overrides["clip_sample"] = scheduler.config.get("clip_sample", False)
        overrides["set_alpha_to_one"] = scheduler.config.get("set_alpha_to_one", False)
    # from_config would leave out what was left at the other class's defaults, which are not DDIMScheduler's.
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    ddim = DDIMScheduler.from_config(config, **overrides)
    if ddim.config.thresholding:
        raise ValueError(
            "scheduler option thresholding: true is not supported: the quantile makes the step's mean depend on the "
            "whole image in a way that has no stable gradient. Set thresholding: false in the scheduler's config."
        )
    _keep_alphas(scheduler, ddim)
    return ddim


def _keep_alphas(scheduler: "SchedulerMixin", ddim: "SchedulerMixin") -> None:
    """Gives `ddim` the other's alphas where no option of DDIMScheduler does, as CogVideoX's and unCLIP's."""
    alphas = scheduler.alphas_cumprod.cpu()
    if torch.allclose(ddim.alphas_cumprod.double(), alphas.double(), rtol=1e-4, atol=1e-6):
        return
    ddim.alphas_cumprod = alphas.clone()
    if not ddim.config.set_alpha_to_one:
        ddim.final_alpha_cumprod = alphas[0]


def flow_matching_scheduler(scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """The `FlowMatchEulerDiscreteScheduler` behind a VP solver that is set up for flow matching.

    Sana and Wan are published with DPM-Solver or UniPC in their flow mode: sigma(t) = shift t / (1 + (shift - 1) t)
    with the constant `flow_shift`. The same curve is FlowMatchEuler's `shift`, whose step is the ODE's Euler step.
    Other schedulers are returned as they are.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = scheduler.config
    if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas", False):
        return scheduler
    if config.get("use_dynamic_shifting", False):
        return scheduler
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=config.get("flow_shift", 1.0)
    )


def noise_grid(scheduler: "SchedulerMixin") -> Grid:
    """The grid of a scheduler whose timesteps are set, in float64 on the CPU.

    Args:
        scheduler: As returned by `training_scheduler`, after `set_timesteps`.

    Raises:
        ValueError: The chain starts without signal, where a prediction of the noise says nothing of the image.
    """
    if is_flow_matching(scheduler):
        sigmas = scheduler.sigmas.double().cpu()
        return Grid(a=1 - sigmas[:-1], s=sigmas[:-1], a_next=1 - sigmas[1:], s_next=sigmas[1:])
    timesteps = scheduler.timesteps.cpu()
    previous = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod.double().cpu()
    start = alphas[timesteps]
    if scheduler.config.prediction_type == "epsilon" and (start == 0).any():
        raise ValueError(
            "the scheduler starts at zero signal (rescale_betas_zero_snr: true with timestep_spacing: "
            f"{scheduler.config.timestep_spacing}), but the model predicts the noise (prediction_type: epsilon), and "
            "x0 = (x - s eps) / a is not defined there. Set timestep_spacing: leading or rescale_betas_zero_snr: false "
            "in the scheduler's config, or take a model with prediction_type: v_prediction."
        )
    final = torch.as_tensor(scheduler.final_alpha_cumprod).double().cpu()
    end = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    return Grid(a=start.sqrt(), s=(1 - start).sqrt(), a_next=end.sqrt(), s_next=(1 - end).sqrt())


def prediction_type(scheduler: "SchedulerMixin") -> PredictionType:
    """What the denoiser of this scheduler predicts."""
    if is_flow_matching(scheduler):
        return "flow"
    return scheduler.config.prediction_type


def clip_range(scheduler: "SchedulerMixin") -> float | None:
    """The bound to which predicted x0 is clamped, or None."""
    if is_flow_matching(scheduler) or not scheduler.config.clip_sample:
        return None
    return float(scheduler.config.clip_sample_range)
