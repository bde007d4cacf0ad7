"""Every sampler against its published step, written here as in the paper, and against diffusers' own schedulers.

The left-hand sides below use each paper's own symbols and take what the network returns; ours go through
`ddpo.sampling.samplers.make_schedule` and `transition`, which know none of them. Everything is float64, on the noise
grids of real models: Stable Diffusion's betas in 50 steps, DDPM's in 100, flow matching with shift 3 in 28.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.pipeline.scheduler import noise_grid, training_scheduler
from ddpo.sampling.samplers import FLOW_ONLY, SamplerConfig, SamplerKind, epoch_schedule, make_schedule, transition
from ddpo.sampling.schedule import PredictionType, Schedule
from ddpo.sampling.step_selection import StepSelection

ETAS = (0.3, 0.7, 1.0)
TOLERANCE = 1e-12
SIZE = (4, 16)
Step = tuple[Tensor, Tensor]
"""Mean and std of the next state."""

Published = Callable[[Tensor, Tensor, Tensor, Tensor, float], Step]
"""The step from x, the network's output, the noise variables at both ends, and eta."""


# ---- the papers' formulas ------------------------------------------------------------------------------------------


def ddim(x: Tensor, eps: Tensor, alpha: Tensor, alpha_previous: Tensor, eta: float) -> Step:
    """DDIM, arXiv:2010.02502: sigma by eq. 16, the mean by eq. 12; alpha is DDPM's alpha bar."""
    sigma = eta * ((1 - alpha_previous) / (1 - alpha)).sqrt() * (1 - alpha / alpha_previous).sqrt()
    predicted_x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    direction_to_x = (1 - alpha_previous - sigma**2).sqrt() * eps
    return alpha_previous.sqrt() * predicted_x0 + direction_to_x, sigma


def ddpm(x: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_previous: Tensor, eta: float) -> Step:
    """DDPM, arXiv:2006.11239: the mean by eq. 11, the variance beta tilde by eq. 7; a step may skip some of theirs."""
    alpha = alpha_bar / alpha_bar_previous
    beta = 1 - alpha
    mean = (x - beta / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt()
    return mean, ((1 - alpha_bar_previous) / (1 - alpha_bar) * beta).sqrt()


def lcm(x: Tensor, eps: Tensor, alpha: Tensor, alpha_previous: Tensor, eta: float) -> Step:
    """Luo et al., arXiv:2310.04378, algorithm 3 at eta 1: the predicted x0, noised anew; less of it is new below 1."""
    x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    kept = (1 - eta**2) ** 0.5
    return alpha_previous.sqrt() * x0 + kept * (1 - alpha_previous).sqrt() * eps, eta * (1 - alpha_previous).sqrt()


def flow_sde(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, a: float) -> Step:
    """Flow-GRPO, arXiv:2505.05470, eq. 9 with sigma_t = a sqrt(t / (1 - t)); dt is negative, the noise has |dt|."""
    dt = t_next - t
    sigma = a * (t / (1 - t)).sqrt()
    return x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt, sigma * (-dt).sqrt()


def dance_sde(z: Tensor, u: Tensor, t: Tensor, t_next: Tensor, eps: float) -> Step:
    """DanceGRPO, arXiv:2505.07818: dz = (u - eps^2/2 grad log p(z)) dt + eps dw, grad log p = -(z - (1-t) x0) / t^2."""
    dt = t_next - t
    score = -(z - (1 - t) * (z - t * u)) / t**2
    return z + (u - 0.5 * eps**2 * score) * dt, eps * (-dt).sqrt()


def cps(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float) -> Step:
    """Flow-CPS, arXiv:2509.05952: the total noise at t_next is t_next, of which sigma = t_next sin(eta pi/2) is new."""
    x0, x1 = x - t * v, x + (1 - t) * v
    sigma = t_next * math.sin(eta * math.pi / 2)
    return (1 - t_next) * x0 + (t_next**2 - sigma**2).sqrt() * x1, sigma


def euler(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor, eta: float) -> Step:
    """The Euler step of the flow's ODE dx = v dt."""
    return x + v * (t_next - t), torch.zeros_like(t)


def ddim_ode(x: Tensor, eps: Tensor, alpha: Tensor, alpha_previous: Tensor, eta: float) -> Step:
    """DDIM's eq. 12 at sigma = 0."""
    return ddim(x, eps, alpha, alpha_previous, 0.0)


VP: dict[SamplerKind, tuple[Published, str]] = {
    "ddim": (ddim, "Song et al., eq. 12 and 16"),
    "ddpm": (ddpm, "Ho et al., eq. 7 and 11"),
    "lcm": (lcm, "Luo et al., algorithm 3"),
    "ode": (ddim_ode, "Song et al., eq. 12"),
}
FLOW: dict[SamplerKind, tuple[Published, str]] = {
    "flow_sde": (flow_sde, "Flow-GRPO, eq. 9"),
    "dance_sde": (dance_sde, "DanceGRPO's SDE"),
    "cps": (cps, "Flow-CPS"),
    "ode": (euler, "Euler step"),
}


# ---- our side ------------------------------------------------------------------------------------------------------


def vp_scheduler(*, num_steps: int = 50, prediction: str = "epsilon", to_one: bool = False) -> DDIMScheduler:
    """Stable Diffusion 1.x's scheduler, its alphas in float64."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=to_one, prediction_type=prediction,
    )  # fmt: skip
    scheduler.set_timesteps(num_steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    return scheduler


def flow_scheduler(*, num_steps: int = 28) -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's scheduler, its sigmas in float64; the first is 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def schedule_of(scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler, kind: SamplerKind, eta: float) -> Schedule:
    """The coefficients of a sampler on a scheduler's grid, float64."""
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    config = SamplerConfig(kind=kind, num_steps=len(scheduler.timesteps), eta=eta)
    return make_schedule(config, noise_grid(scheduler), model_time=scheduler.timesteps, is_flow=is_flow, clip=None)


def draw(step: int) -> Step:
    """A state and a network's output, (4, 16) each, exact in float32 too: diffusers' flow step rounds its sample."""
    generator = torch.Generator().manual_seed(step)
    x, output = torch.randn(2, *SIZE, generator=generator)
    return x.double(), output.double()


def largest_errors(
    schedule: Schedule, published: Callable[[int, Tensor, Tensor], Step], steps: range, kind: PredictionType
) -> Step:
    """Largest absolute difference in mean and in std over some steps, scalars."""
    worst = torch.zeros(2, dtype=torch.float64)
    for k in steps:
        x, output = draw(k)
        mean, std = published(k, x, output)
        ours = transition(schedule, k, x, output, kind=kind)
        found = torch.stack([(ours.mean - mean).abs().max(), (ours.std - std).abs().max()])
        worst = torch.maximum(worst, found)
    return worst[0], worst[1]


def rows(name: str, source: str, errors: list[Step], *, where: str = "every step") -> Iterator[Measurement]:
    """One measurement for the mean and one for the std."""
    for what, values in zip(("mean", "std"), zip(*errors, strict=True), strict=True):
        error = float(torch.stack(values).max())
        yield Measurement(name=f"{name}: {what}", exact=source, obtained=where, error=error, tolerance=TOLERANCE)


# ---- the checks ----------------------------------------------------------------------------------------------------


def check_vp() -> Iterator[Measurement]:
    """`ddim`, `ddpm`, `lcm` and `ode` at every step of Stable Diffusion's schedule, for each prediction type."""
    for kind, (formula, source) in VP.items():
        errors = []
        for to_one, prediction in ((False, "epsilon"), (True, "epsilon"), (False, "v_prediction"), (False, "sample")):
            scheduler = vp_scheduler(to_one=to_one, prediction=prediction)
            for eta in (1.0,) if kind == "ddpm" else ETAS:
                published = partial(_vp_step, formula, scheduler, prediction, eta)
                schedule = schedule_of(scheduler, kind, eta)
                errors.append(largest_errors(schedule, published, range(50), scheduler.config.prediction_type))
        yield from rows(kind if kind != "ode" else "ode (VP)", source, errors)


def _vp_step(
    formula: Published, scheduler: DDIMScheduler, prediction: str, eta: float, k: int, x: Tensor, output: Tensor
) -> Step:
    """A VP paper's step from any kind of prediction; v = sqrt(alpha) eps - sqrt(1 - alpha) x0 (arXiv:2202.00512)."""
    t = int(scheduler.timesteps[k])
    previous = t - 1000 // len(scheduler.timesteps)
    alpha = scheduler.alphas_cumprod[t]
    alpha_previous = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    match prediction:
        case "v_prediction":
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * x
        case "sample":
            output = (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    return formula(x, output, alpha, alpha_previous, eta)


def check_flow() -> Iterator[Measurement]:
    """`flow_sde`, `dance_sde`, `cps` and `ode` between the singular ends, i.e. without the first and the last step."""
    scheduler = flow_scheduler()
    for kind, (formula, source) in FLOW.items():
        errors = []
        for eta in ETAS:
            published = partial(_flow_step, formula, scheduler.sigmas, eta)
            errors.append(largest_errors(schedule_of(scheduler, kind, eta), published, range(1, 27), "flow"))
        yield from rows(kind if kind != "ode" else "ode (flow)", source, errors, where="all but first, last")


def _flow_step(formula: Published, sigmas: Tensor, eta: float, k: int, x: Tensor, output: Tensor) -> Step:
    return formula(x, output, sigmas[k], sigmas[k + 1], eta)


def check_ends() -> Iterator[Measurement]:
    """The first step, from sigma = 1, and the last, to sigma = 0, where some published formulas have no value."""
    scheduler = flow_scheduler()
    sigmas = scheduler.sigmas
    x, v = draw(0)
    first = []
    for eta in ETAS:
        ours = transition(schedule_of(scheduler, "flow_sde", eta), 0, x, v, kind="flow")
        dt, w = sigmas[1] - 1, eta / (1 - sigmas[1]).sqrt()  # Flow-GRPO's code: the next sigma where 1 - sigma is 0
        mean = x + (v + w**2 / 2 * x) * dt
        first.append(((ours.mean - mean).abs().max(), (ours.std - w * (-dt).sqrt()).abs().max()))
    yield from rows("flow_sde, sigma = 1", "Flow-GRPO's code", first, where="first step")
    for kind in ("dance_sde", "cps"):
        formula, source = FLOW[kind]
        errors = [
            largest_errors(
                schedule_of(scheduler, kind, eta), partial(_flow_step, formula, sigmas, eta), range(1), "flow"
            )
            for eta in ETAS
        ]
        yield from rows(f"{kind}, sigma = 1", source, errors, where="first step")
    last = []
    for kind in (*FLOW_ONLY, "ode"):
        ours = transition(schedule_of(scheduler, kind, 0.7), 27, x, v, kind="flow")
        last.append(((ours.mean - (x - sigmas[27] * v)).abs().max(), ours.std.abs().max()))
    yield from rows("last step of flow samplers", "the predicted x0, no noise", last, where="last step")


def check_diffusers() -> Iterator[Measurement]:
    """The same noise through diffusers' own `step` and through ours gives the same next state."""
    noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    worst = 0.0
    for to_one in (False, True):
        for eta in (0.0, *ETAS):
            scheduler = vp_scheduler(to_one=to_one)
            for k, t in enumerate(scheduler.timesteps):
                x, output = draw(k)
                stock = scheduler.step(output, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
                ours = transition(schedule_of(scheduler, "ddim", eta), k, x, output, kind="epsilon").sample(noise)
                worst = max(worst, float((ours - stock).abs().max()))
    yield Measurement(name="ddim: next state", exact="DDIMScheduler.step", obtained="every step", error=worst,
                      tolerance=TOLERANCE)  # fmt: skip
    yield _against_ddpm_scheduler()
    flow = flow_scheduler()
    schedule, worst = schedule_of(flow, "ode", 0.0), 0.0
    for k, t in enumerate(flow.timesteps):
        x, output = draw(k)
        stock = flow.step(output, t, x, return_dict=False)[0]
        worst = max(worst, float((transition(schedule, k, x, output, kind="flow").mean - stock).abs().max()))
    yield Measurement(name="ode (flow): next state", exact="FlowMatchEulerDiscreteScheduler.step",
                      obtained="every step", error=worst, tolerance=TOLERANCE)  # fmt: skip


def _against_ddpm_scheduler() -> Measurement:
    stock = DDPMScheduler(clip_sample=False)
    stock.set_timesteps(100)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    ours = training_scheduler(stock)
    ours.set_timesteps(100)
    ours.alphas_cumprod = ours.alphas_cumprod.double()
    schedule = schedule_of(ours, "ddpm", 1.0)
    worst = 0.0
    for k, t in enumerate(stock.timesteps):
        x, output = draw(k)
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        expected = stock.step(output, t, x, generator=torch.Generator().manual_seed(k), return_dict=False)[0]
        found = transition(schedule, k, x, output, kind="epsilon").sample(noise)
        worst = max(worst, float((found - expected).abs().max()))
    return Measurement(name="ddpm: next state", exact="DDPMScheduler.step", obtained="every step", error=worst,
                       tolerance=TOLERANCE)  # fmt: skip


def check_selection() -> Iterator[Measurement]:
    """Outside the window a step is the ODE's, inside it the sampler's."""
    scheduler = flow_scheduler()
    selection = StepSelection(kind="window", size=4, start=3, shift_every_epochs=0)
    ode = schedule_of(scheduler, "ode", 0.0)
    for kind in FLOW_ONLY:
        noisy = schedule_of(scheduler, kind, 0.7)
        mixed = epoch_schedule(noisy, ode, selection, epoch=0, seed=0)
        worst = 0.0
        for k in range(28):
            x, v = draw(k)
            expected = FLOW[kind if 3 <= k < 7 else "ode"][0](x, v, scheduler.sigmas[k], scheduler.sigmas[k + 1], 0.7)
            ours = transition(mixed, k, x, v, kind="flow")
            error = max(float((ours.mean - expected[0]).abs().max()), float((ours.std - expected[1]).abs().max()))
            worst = max(worst, error)
        yield Measurement(name=f"{kind} at steps 3-6 of 28: mean, std", exact=f"{FLOW[kind][1]} / Euler step",
                          obtained="every step", error=worst, tolerance=TOLERANCE)  # fmt: skip


CHECKS = (
    Check(name="VP", group="samplers", level="fast", run=check_vp,
          claim="DDIM, DDPM and the ODE make the published step from any kind of prediction, the last one included."),
    Check(name="flow", group="samplers", level="fast", run=check_flow,
          claim="The SDEs of Flow-GRPO and DanceGRPO, Flow-CPS and the ODE make the published step."),
    Check(name="singular ends", group="samplers", level="fast", run=check_ends,
          claim="From sigma 1 and to sigma 0 every step is finite, and what docs/samplers.md says."),
    Check(name="diffusers", group="samplers", level="fast", run=check_diffusers,
          claim="The same noise gives the same next state as diffusers' own schedulers."),
    Check(name="window", group="samplers", level="fast", run=check_selection,
          claim="Steps outside the window follow the ODE, steps inside it the sampler."),
)  # fmt: skip
