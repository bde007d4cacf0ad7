"""Samplers: how much noise each step adds, and how its mean makes room for it.

A sampler is a rule for std and for the weight of the predicted noise (`direction`), given a step's two ends
(a, s) -> (a', s'):

    exact rule  direction = sqrt(s'^2 - std^2)      keeps the marginals a' x0 + s' eps for a perfect network
    euler rule  direction = s' - std^2 / (2 s)      one Euler-Maruyama step of the reverse SDE (flow matching)

| kind      | std                                       | rule  | source                                           |
|-----------|-------------------------------------------|-------|--------------------------------------------------|
| ddim      | eta sqrt((s'^2/s^2)(1 - a^2/a'^2))        | exact | Song et al., arXiv:2010.02502, eq. 16            |
| ddpm      | the same at eta = 1                       | exact | Ho et al., arXiv:2006.11239, eq. 7 and 11        |
| lcm       | eta s'                                    | exact | Luo et al., arXiv:2310.04378, multistep sampling |
| ode       | 0                                         | exact | the same at eta = 0; Euler for flow matching     |
| cps       | s' sin(eta pi/2)                          | exact | Flow-CPS, arXiv:2509.05952                       |
| flow_sde  | eta sqrt(s/(1-s)) sqrt(s-s')              | euler | Flow-GRPO, arXiv:2505.05470, eq. 9               |
| dance_sde | eta sqrt(s-s')                            | euler | DanceGRPO, arXiv:2505.07818                      |

Some of the steps may be left to the ODE: see `ddpo.sampling.step_selection`. What happens at the singular ends (s = 1,
s' = 0) and how close each sampler comes to its published formula is in docs/samplers.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.prediction import Prediction, predict
from ddpo.sampling.schedule import Grid, PredictionType, Schedule, coefficient
from ddpo.sampling.step_selection import StepSelection, select_steps
from ddpo.validation import FieldError, UserError, check

SamplerKind = Literal["ddim", "ddpm", "lcm", "ode", "flow_sde", "dance_sde", "cps"]
VP_ONLY: tuple[SamplerKind, ...] = ("ddim", "ddpm", "lcm")
FLOW_ONLY: tuple[SamplerKind, ...] = ("flow_sde", "dance_sde", "cps")
LastStep = Literal["stock", "noisy", "pretrained"]
MEMORYLESS_FLOW_ETA = math.sqrt(2)  # sigma^2 = 2 s / (1 - s): Domingo-Enrich et al., arXiv:2409.08861, section 4
MAX_STEPS = 100_000  # a hundred times the levels that VP models are trained on


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are sampled.

    Attributes:
        kind: `ddim` for VP models, `ddpm` (ancestral sampling) for the same at eta 1, `lcm` for those that were
            distilled to consistency; `flow_sde`, `dance_sde`, `cps` for flow matching; `ode` for both, without noise.
        num_steps: Denoising steps T.
        eta: Noise level, 0 for none, up to 1; 1 with `ddpm`. `flow_sde` may have sqrt 2, which is memoryless in the
            limit of many steps, as DDIM's 1 is.
        guidance_scale: Classifier-free guidance; 1 for none.
        height: Image height in pixels, given with the width; null takes the pipeline's own.
        width: Image width in pixels, given with the height; null takes the pipeline's own.
        num_frames: Frames of a video pipeline; null takes the pipeline's own.
        guidance_rescale: How far guided outputs are brought back to the spread of the conditional ones, in [0, 1]
            (Lin et al., arXiv:2305.08891, section 3.4), for pipelines that offer it (Stable Diffusion, SDXL).
        stochastic_steps: Which steps have noise and are trained; the others follow the ODE.
        last_step: Where the chain ends, and by which weights. `stock`: where the pipeline's own sampler ends, in many
            pipelines without noise, by the trained weights; a likelihood objective does not see what they do there.
            `pretrained`: at the same place; if that step has no noise, the pretrained weights make it. `noisy`: at the
            smallest noise level at which it still has a density. Under both of these, where all other steps have noise,
            the gradient of a likelihood objective is complete and the path KL bounds the pictures' KL: see
            docs/samplers.md. Samplers without noise have the stock end.
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
    stochastic_steps: StepSelection = field(default_factory=StepSelection)
    last_step: LastStep = "stock"

    def __post_init__(self) -> None:
        check(1 <= self.num_steps <= MAX_STEPS, "num_steps", self.num_steps, f"at least 1, at most {MAX_STEPS:,}")
        most = MEMORYLESS_FLOW_ETA if self.kind in ("flow_sde", "ode") else 1.0  # the ODE of one has its eta
        check(0 <= self.eta <= most, "eta", self.eta, f"in [0, {most:.5g}]")
        check(
            self.kind != "ddpm" or self.eta == 1, "eta", self.eta, "1 with kind: ddpm (for less noise use kind: ddim)"
        )
        check(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "at least 0")
        for name, pixels in (("height", self.height), ("width", self.width)):
            check(pixels is None or pixels >= 8, name, pixels, "at least 8 pixels or null")
        together = "given together with height: pipelines ignore one without the other"
        check((self.height is None) == (self.width is None), "width", self.width, together)
        check(self.num_frames is None or self.num_frames >= 1, "num_frames", self.num_frames, "at least 1 or null")
        check(0 <= self.guidance_rescale <= 1, "guidance_rescale", self.guidance_rescale, "in [0, 1]")
        try:
            _ = self.max_stochastic_steps
        except FieldError as error:
            name = f"stochastic_steps.{error.field}"
            raise FieldError(name, error.value, f"{error.expected} (of num_steps {self.num_steps})") from error

    @property
    def is_noise_free(self) -> bool:
        """Whether no step has noise."""
        return self.kind == "ode" or self.eta == 0

    @property
    def ends_noisy(self) -> bool:
        """Whether the last step is given noise that the pipeline's own may not have."""
        return self.last_step == "noisy" and not self.is_noise_free

    def check_last_step(self) -> None:
        """Raises `FieldError` where nothing would read `last_step`: without noise, or without any in the last step."""
        without = f"stock with {'kind: ode' if self.kind == 'ode' else 'eta: 0'} (without noise all steps are alike)"
        check(self.last_step == "stock" or not self.is_noise_free, "last_step", self.last_step, without)
        never = "stock or pretrained with stochastic_steps that never come to the last step"
        reaches = self.stochastic_steps.reaches_last(self.num_steps)
        check(reaches or not self.ends_noisy, "last_step", self.last_step, never)

    def steps_from_first_unseen(self, num_stochastic: int) -> int:
        """At most how many steps a chain has from the first on that the trained weights make without noise.

        Args:
            num_stochastic: Steps with noise, or one more.
        """
        before = num_stochastic if self.stochastic_steps.starts_noisy else 0
        return max(1, self.num_steps - before)

    @property
    def hides_no_step(self) -> bool:
        """Whether, whatever the pipeline, the trained weights make no step without noise."""
        covered = self.stochastic_steps.kind == "all" and self.stochastic_steps.reaches_last(self.num_steps)
        return covered and self.last_step != "stock" and not self.is_noise_free

    @property
    def max_stochastic_steps(self) -> int:
        """How many steps are stochastic, or one more: `ddim`'s stock last step may turn out to have no noise."""
        if self.is_noise_free:
            return 0
        noise_free_end = self.kind in FLOW_ONLY and not self.ends_noisy
        noisy = range(self.num_steps - 1 if noise_free_end else self.num_steps)
        return self.stochastic_steps.count(self.stochastic_steps.candidates(noisy, self.num_steps))


def ddim_std(grid: Grid, eta: float) -> Tensor:
    """DDIM's noise level, (T,); eta = 1 is DDPM's ancestral sampling with the small variance."""
    variance = (grid.s_next / grid.s) ** 2 * (1 - (grid.a / grid.a_next) ** 2)
    return eta * variance.clamp(min=0).sqrt()


def ddpm_std(grid: Grid, eta: float) -> Tensor:
    """DDPM's small variance, (T,): that of q(x' | x, x0)."""
    return ddim_std(grid, 1.0)


def lcm_std(grid: Grid, eta: float) -> Tensor:
    """Multistep consistency sampling's noise level, (T,): at eta 1 all noise is drawn anew on the predicted x0."""
    return eta * grid.s_next


def cps_std(grid: Grid, eta: float) -> Tensor:
    """Coefficients-preserving sampling's noise level, (T,)."""
    return grid.s_next * math.sin(eta * math.pi / 2)


def flow_sde_std(grid: Grid, eta: float) -> Tensor:
    """Flow-GRPO's noise level, (T,). At s = 1, where 1 - s vanishes, the level of the step's end stands in there.

    A scheduler's first sigma may be 1 only up to the rounding of float32.
    """
    level = torch.where(grid.s < 1 - 1e-5, grid.s, grid.s_next)
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
    "ddpm": (ddpm_std, exact_direction),
    "lcm": (lcm_std, exact_direction),
    "ode": (ode_std, exact_direction),
    "cps": (cps_std, exact_direction),
    "flow_sde": (flow_sde_std, euler_direction),
    "dance_sde": (dance_sde_std, euler_direction),
}


def make_schedule(
    config: SamplerConfig, grid: Grid, *, model_time: Tensor, is_flow: bool, clip: float | None
) -> Schedule:
    """The coefficients of every step, in float64, with noise wherever the sampler has any.

    Args:
        config: Sampler and noise level.
        grid: Noise levels of the chain, float64, which ends with noise where `config.ends_noisy`.
        model_time: What the denoiser receives at each step, (T,).
        is_flow: Whether the grid is that of a flow-matching model.
        clip: Bound on the predicted x0, or None.

    Raises:
        FieldError: The sampler does not fit the model family.
        UserError: It has no noise level on this grid.
    """
    fitting = ("ode", *FLOW_ONLY) if is_flow else (*VP_ONLY, "ode")
    if config.kind not in fitting:
        family = "flow-matching" if is_flow else "VP"
        kinds = f"{', '.join(fitting[:-1])} or {fitting[-1]}"
        raise FieldError("sampler.kind", config.kind, f"{kinds} with a {family} model")
    rising = torch.nonzero(grid.s_next > grid.s).flatten().tolist()
    if rising:
        before, after = float(grid.s[rising[0]]), float(grid.s_next[rising[0]])
        raise UserError(
            f"the scheduler's noise level rises from {before:.4g} to {after:.4g} at step {rising[0]}, "
            "and a policy goes from noise to an image: give the pipeline a scheduler whose noise falls "
            "(FlowMatchEulerDiscreteScheduler with invert_sigmas: false)"
        )
    std_rule, direction_rule = RULES[config.kind]
    std = std_rule(grid, config.eta)
    # A last step that ends at s' = 0 has std 0 under every rule with a density of its own there, or none.
    std = torch.where(grid.s_next > 0, std, torch.zeros_like(std))
    direction = direction_rule(grid, std)
    if config.ends_noisy:
        # An SDE's noise does not vanish with s'; at this end all noise is to be s'.
        std[-1] = torch.minimum(std[-1], grid.s_next[-1])
        direction[-1] = exact_direction(grid, std)[-1]
    if not std.isfinite().all():
        raise UserError(
            f"sampler.kind {config.kind!r} has the noise levels {std.tolist()} on this scheduler's grid; choose other "
            "timesteps (the scheduler's shift or timestep_spacing, sampler.num_steps) or another sampler"
        )
    return Schedule(
        model_time=model_time,
        a=grid.a,
        s=grid.s,
        a_next=grid.a_next,
        direction=direction,
        std=std,
        stochastic=std > 0,
        pretrained_steps=_pretrained_steps(config, std),
        clip=clip,
        consistent=config.kind == "ddpm",
    )


def _pretrained_steps(config: SamplerConfig, std: Tensor) -> tuple[int, ...]:
    """The last step, where the pretrained weights are to make it; not that of an ODE, whose steps are all alike."""
    is_theirs = config.last_step == "pretrained" and not config.is_noise_free and float(std[-1]) == 0
    return (len(std) - 1,) if is_theirs else ()


def epoch_schedule(noisy: Schedule, ode: Schedule, selection: StepSelection, *, epoch: int, seed: int) -> Schedule:
    """The schedule of an epoch: noise at the selected steps, the ODE at the others.

    Args:
        noisy: With noise wherever the sampler has any.
        ode: The same chain without noise, at its stock end.
        selection: Which steps are to be stochastic.
        epoch: Finished epochs.
        seed: Of the run.

    Raises:
        FieldError: There are fewer noisy steps than are to be selected.
    """
    steps = noisy.stochastic_steps
    if not steps or selection == StepSelection():
        return noisy
    try:
        chosen = select_steps(selection, steps, num_steps=noisy.num_steps, epoch=epoch, seed=seed)
    except FieldError as error:
        expected = f"{error.expected} (steps {steps[0]} to {steps[-1]} have noise)"
        raise FieldError(f"sampler.stochastic_steps.{error.field}", error.value, expected) from error
    stochastic = torch.zeros_like(noisy.stochastic)
    stochastic[list(chosen)] = True
    return replace(
        noisy,
        a_next=torch.where(stochastic, noisy.a_next, ode.a_next),
        std=torch.where(stochastic, noisy.std, ode.std),
        direction=torch.where(stochastic, noisy.direction, ode.direction),
        stochastic=stochastic,
    )


def predicted(schedule: Schedule, k: int | Tensor, x: Tensor, output: Tensor, *, kind: PredictionType) -> Prediction:
    """Clean latents and noise, from what the denoiser returned.

    Args:
        schedule: Coefficients of the chain.
        k: Step index, an int or (B,) int64.
        x: Latents, (B, *latent); the result has their precision.
        output: The denoiser's output after guidance, (B, *latent).
        kind: What the output is.

    Returns:
        x0_hat and eps_hat (clipped and made consistent where the schedule says so), (B, *latent) each.
    """
    a, s = coefficient(schedule.a, k, x), coefficient(schedule.s, k, x)
    prediction = predict(output.to(x.dtype), x, a, s, kind=kind)
    if schedule.clip is None:
        return prediction
    x0 = prediction.x0.clamp(-schedule.clip, schedule.clip)
    return Prediction(x0=x0, eps=(x - a * x0) / s if schedule.consistent else prediction.eps)


def step(schedule: Schedule, k: int | Tensor, prediction: Prediction) -> Gaussian:
    """The distribution of the next latents, a_next x0_hat + direction eps_hat with std.

    Args:
        schedule: Coefficients of the chain.
        k: Step index, an int or (B,) int64.
        prediction: What the denoiser sees at step k, (B, *latent).
    """
    x0, eps = prediction.x0, prediction.eps
    mean = coefficient(schedule.a_next, k, x0) * x0 + coefficient(schedule.direction, k, eps) * eps
    return Gaussian(mean=mean, std=coefficient(schedule.std, k, x0))


def transition(schedule: Schedule, k: int | Tensor, x: Tensor, output: Tensor, *, kind: PredictionType) -> Gaussian:
    """The distribution of the next latents, from what the denoiser returned; arguments as for `predicted`."""
    return step(schedule, k, predicted(schedule, k, x, output, kind=kind))
