"""Schedulers of diffusers as chains: which one a policy follows, its noise grid, and the sampler that fits it."""

import copy
import inspect
import logging
from dataclasses import replace

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)

from ddpo.sampling.samplers import SamplerConfig, SamplerKind
from ddpo.sampling.schedule import Grid, PredictionType
from ddpo.validation import FieldError, UserError

_LOG = logging.getLogger(__name__)

# Parts of the names of schedulers whose models are of another family.
FAMILIES = {
    "EDM": "an EDM model, a family",
    "SCM": "distilled for a few steps of TrigFlow, a family",
    "CMStochastic": "a consistency model, a family",
    "LCM": "distilled for a few steps, of a family",
}


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is diffusers' flow-matching Euler, the one that flow-matching models are sampled by here."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler whose grid and prediction type the policy follows.

    Any VP scheduler (PNDM, Euler, DPM-Solver, ...) becomes the `DDIMScheduler` of the same noise schedule, since DDIM
    is the family of one-step Gaussian samplers of a VP model; a line of the log says so. Flow-matching schedulers stay,
    and so does that of latent consistency models, whose timesteps they were distilled for.

    Args:
        scheduler: The pipeline's own.

    Returns:
        A `DDIMScheduler`, or the given `FlowMatchEulerDiscreteScheduler` or `LCMScheduler`.

    Raises:
        UserError: The scheduler has neither `alphas_cumprod` nor flow-matching sigmas, samples a distilled model, is a
            VP solver set up for flow matching, or thresholds x0 dynamically.
    """
    if is_flow_matching(scheduler):
        return scheduler
    _check_family(scheduler)
    if isinstance(scheduler, LCMScheduler):
        return scheduler
    overrides: dict[str, object] = {}
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        # Solvers without these two options never clip, but DDIMScheduler's own default would clip latents to [-1, 1].
        overrides["clip_sample"] = scheduler.config.get("clip_sample", False)
        overrides["set_alpha_to_one"] = scheduler.config.get("set_alpha_to_one", False)
    # from_config would leave out what was left at the other class's defaults, which are not DDIMScheduler's.
    known = inspect.signature(DDIMScheduler).parameters
    config = {key: value for key, value in scheduler.config.items() if key in known}
    ddim = DDIMScheduler.from_config(config, **overrides)
    if _start(scheduler) > _start(ddim):  # what it starts from is pure noise there, and would not be here
        ddim = DDIMScheduler.from_config(config, **overrides, timestep_spacing="trailing")
    _keep_alphas(scheduler, ddim)
    if type(scheduler) is not DDIMScheduler:
        _LOG.warning(
            "%s is replaced by DDIMScheduler on the same noise levels (timestep_spacing: %s): its steps are those that "
            "have a likelihood", type(scheduler).__name__, ddim.config.timestep_spacing,
        )  # fmt: skip
    return ddim


def _check_family(scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler that is not of a VP model."""
    name = type(scheduler).__name__
    if name == "TCDScheduler":
        raise UserError(
            f"scheduler {name} samples a distilled model in steps that no sampler here has. To train it by consistency "
            "sampling (sampler.kind: lcm), give the pipeline LCMScheduler.from_config(pipeline.scheduler.config)"
        )
    if scheduler.config.get("thresholding", False):
        raise UserError(
            "scheduler option thresholding: true is not supported: the quantile makes the step's mean depend on the "
            "whole image in a way that has no stable gradient. Set thresholding: false in the scheduler's config."
        )
    if name == "FlowMatchHeunDiscreteScheduler":
        raise UserError(
            f"scheduler {name} calls the network twice a step; give the pipeline "
            "FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)"
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        family = next((text for part, text in FAMILIES.items() if part in name), "of a family")
        raise UserError(
            f"scheduler {name} has no alphas_cumprod and is not FlowMatchEulerDiscreteScheduler: its model is {family} "
            "without a sampler here, and it cannot be trained"
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample") or scheduler.config.get("use_flow_sigmas", False):
        raise UserError(
            f"scheduler {name} with prediction_type {kind!r} runs a flow-matching model with a "
            "VP solver; give the pipeline a FlowMatchEulerDiscreteScheduler"
        )


def _start(scheduler: SchedulerMixin) -> float:
    """The first timestep of a short chain."""
    trial = copy.deepcopy(scheduler)
    trial.set_timesteps(min(10, trial.config.num_train_timesteps))
    return float(trial.timesteps[0])


def _keep_alphas(scheduler: SchedulerMixin, ddim: SchedulerMixin) -> None:
    """Gives `ddim` the other's alphas where no option of DDIMScheduler does, as CogVideoX's and unCLIP's."""
    alphas = scheduler.alphas_cumprod.cpu()
    if torch.allclose(ddim.alphas_cumprod.double(), alphas.double(), rtol=1e-4, atol=1e-6):
        return
    ddim.alphas_cumprod = alphas.clone()
    if not ddim.config.set_alpha_to_one:
        ddim.final_alpha_cumprod = alphas[0]


def flow_matching_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The `FlowMatchEulerDiscreteScheduler` behind a VP solver that is set up for flow matching.

    Sana and Wan are published with DPM-Solver or UniPC in their flow mode: sigma(t) = shift t / (1 + (shift - 1) t)
    with the constant `flow_shift`. The same curve is FlowMatchEuler's `shift`, whose step is the ODE's Euler step.
    Other schedulers are returned as they are.
    """
    config = scheduler.config
    if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas", False):
        return scheduler
    if config.get("use_dynamic_shifting", False):
        return scheduler
    shift = config.get("flow_shift", 1.0)
    _LOG.warning(
        "%s is replaced by FlowMatchEulerDiscreteScheduler on the same noise levels (shift: %g): its steps are those "
        "that have a likelihood", type(scheduler).__name__, shift,
    )  # fmt: skip
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift)


FLOW_END_NOISE = 0.03
"""Noise level at which a flow-matching chain ends where its last step is to have noise: Stable Diffusion 1.x ends at
.029, in latents of the same unit spread."""


def noise_grid(scheduler: SchedulerMixin, *, ends_noisy: bool = False) -> Grid:
    """The grid of a scheduler whose timesteps are set, in float64 on the CPU.

    Args:
        scheduler: As returned by `training_scheduler`, after `set_timesteps`.
        ends_noisy: Whether the last step ends with noise, so that it has a density: see `_noisy_end`.

    Raises:
        UserError: The chain starts without signal, where a prediction of the noise says nothing of the image.
    """
    if is_flow_matching(scheduler):
        sigmas = scheduler.sigmas.double().cpu()
        grid = Grid(a=1 - sigmas[:-1], s=sigmas[:-1], a_next=1 - sigmas[1:], s_next=sigmas[1:])
        return _noisy_end(grid, a=1.0, s=FLOW_END_NOISE) if ends_noisy else grid
    if isinstance(scheduler, LCMScheduler):
        grid = _consistency_grid(scheduler)
        return _noisy_end(grid, **_first_levels(scheduler)) if ends_noisy else grid
    timesteps = scheduler.timesteps.cpu()
    previous = timesteps - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod.double().cpu()
    start = alphas[timesteps]
    if scheduler.config.prediction_type == "epsilon" and (start == 0).any():
        raise UserError(
            "the scheduler starts at zero signal (rescale_betas_zero_snr: true with timestep_spacing: "
            f"{scheduler.config.timestep_spacing}), but the model predicts the noise (prediction_type: epsilon), and "
            "x0 = (x - s eps) / a is not defined there. Set timestep_spacing: leading or rescale_betas_zero_snr: false "
            "in the scheduler's config, or take a model with prediction_type: v_prediction."
        )
    final = torch.as_tensor(scheduler.final_alpha_cumprod).double().cpu()
    end = torch.where(previous >= 0, alphas[previous.clamp(min=0)], final)
    grid = Grid(a=start.sqrt(), s=(1 - start).sqrt(), a_next=end.sqrt(), s_next=(1 - end).sqrt())
    return _noisy_end(grid, **_first_levels(scheduler)) if ends_noisy else grid


def _first_levels(scheduler: SchedulerMixin) -> dict[str, float]:
    """Signal and noise at a VP schedule's first timestep, where there is least noise."""
    alpha = scheduler.alphas_cumprod[0].double()
    return {"a": float(alpha.sqrt()), "s": float((1 - alpha).sqrt())}


def _consistency_grid(scheduler: LCMScheduler) -> Grid:
    """From each of its timesteps to the next; from the last one to the predicted x0."""
    levels = scheduler.alphas_cumprod.double().cpu()[scheduler.timesteps.cpu()]
    ends = torch.cat([levels[1:], levels.new_ones(1)])
    return Grid(a=levels.sqrt(), s=(1 - levels).sqrt(), a_next=ends.sqrt(), s_next=(1 - ends).sqrt())


def _noisy_end(grid: Grid, *, a: float, s: float) -> Grid:
    """The grid with a last step that ends at (a, s), the smallest noise level at which it still has a density.

    A last step that starts there already, or lower, ends at half the noise that it starts with.

    Args:
        grid: Of the chain, T steps.
        a: Signal level of the end: the schedule's first for VP models, as Stable Diffusion 1.x ends; 1 for flow
            matching, x_T = x0_hat + noise, which does not fade the image.
        s: Noise level of the end, positive.
    """
    start = float(grid.s[-1])
    if s >= start:
        s = 0.5 * start
        a = 1.0 if a == 1.0 else (1 - s**2) ** 0.5
    a_next, s_next = grid.a_next.clone(), grid.s_next.clone()
    a_next[-1], s_next[-1] = a, s
    return replace(grid, a_next=a_next, s_next=s_next)


def prediction_type(scheduler: SchedulerMixin) -> PredictionType:
    """What the denoiser of this scheduler predicts."""
    if is_flow_matching(scheduler):
        return "flow"
    return scheduler.config.prediction_type


def clip_range(scheduler: SchedulerMixin) -> float | None:
    """The bound to which predicted x0 is clamped, or None."""
    if is_flow_matching(scheduler) or not scheduler.config.clip_sample:
        return None
    return float(scheduler.config.clip_sample_range)


def check_sampler(scheduler: SchedulerMixin, kind: SamplerKind) -> None:
    """Refuses consistency sampling of a model that was not distilled to it, and the other way round.

    Args:
        scheduler: As returned by `training_scheduler`.
        kind: Of the sampler.

    Raises:
        FieldError: They do not fit.
    """
    distilled = isinstance(scheduler, LCMScheduler)
    if distilled and kind not in ("lcm", "ode"):
        raise FieldError("sampler.kind", kind, "lcm or ode with LCMScheduler, the scheduler of a distilled model")
    if kind == "lcm" and not distilled:
        cure = "another with this model (lcm is for one with LCMScheduler, distilled to predict x0 at any step)"
        raise FieldError("sampler.kind", kind, cure)


def default_sampler(
    scheduler: SchedulerMixin, *, num_steps: int = 50, guidance_scale: float = 5.0, kind: SamplerKind | None = None
) -> SamplerConfig:
    """The sampler that fits a pipeline's scheduler.

    Ancestral DDIM for VP models, consistency sampling for those distilled to it, Flow-GRPO's SDE for flow matching.

    Args:
        scheduler: The pipeline's own.
        num_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        kind: Take this kind instead; the noise level is still the model family's.
    """
    flow = is_flow_matching(scheduler)
    fitting: SamplerKind = "flow_sde" if flow else "lcm" if isinstance(scheduler, LCMScheduler) else "ddim"
    return SamplerConfig(
        kind=kind or fitting,
        eta=0.7 if flow else 1.0,  # 0.7 is Flow-GRPO's noise level (arXiv:2505.05470)
        num_steps=num_steps,
        guidance_scale=guidance_scale,
    )
