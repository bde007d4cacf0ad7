"""A diffusers pipeline whose data are a known Gaussian mixture, so that its denoiser is exact.

It has the interface of a stock text-to-image pipeline (prompts, scheduler, denoiser, decoding), hence `ddpo.Policy`,
the rollout, the objectives and the trainer run on it as on Stable Diffusion; but what they should find is known in
closed form (`ddpo.control.diffusion.chain`, `ddpo.control.diffusion.grid_chain`). The prompts are ignored.

For data sum_i w_i N(m_i, S_i) and x = a x0 + s eps the exact prediction is

    E[x0 | x] = sum_i p(i | x) [ m_i + a S_i (a^2 S_i + s^2 I)^(-1) (x - a m_i) ]

What is trained is a head beside it (`ddpo.control.diffusion.toy_heads`).

T steps, d dimensions, K components, B batch.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpo.control.diffusion.toy_heads import HeadKind, make_head
from ddpo.pipeline.scheduler import noise_grid
from ddpo.sampling.samplers import SamplerConfig, epoch_schedule, make_schedule
from ddpo.sampling.schedule import Schedule

PIXEL_RANGE = 40.0  # states are shown as pixel values 1/2 + x / PIXEL_RANGE


class ExactDenoiser(ModelMixin, ConfigMixin):
    """Predicts E[x0 | x] of Gaussian-mixture data, moved by a trainable head.

    The output is x0 for a VP scheduler (`prediction_type: sample`) and the velocity eps - x0 for flow matching.
    """

    @register_to_config
    def __init__(
        self,
        *,
        times: Sequence[float],
        signal: Sequence[float],
        noise: Sequence[float],
        head_scale: Sequence[float],
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        covs: Sequence[Sequence[Sequence[float]]],
        is_flow: bool,
        head_kind: HeadKind,
    ) -> None:
        """Tabulates the prediction at every step.

        Args:
            times: What the denoiser receives as its timestep, T values.
            signal: a of each step, T.
            noise: s of each step, T.
            head_scale: By what the head's output moves x0, T.
            weights: Of the components, K.
            means: K x d.
            covs: K x d x d.
            is_flow: Whether the output is a velocity.
            head_kind: What is trained.
        """
        super().__init__()
        mean = torch.tensor(means, dtype=torch.float64)
        cov = torch.tensor(covs, dtype=torch.float64)
        a, s = torch.tensor(signal, dtype=torch.float64), torch.tensor(noise, dtype=torch.float64)
        dims = mean.shape[1]
        eye = torch.eye(dims, dtype=torch.float64)
        spread = a[:, None, None, None] ** 2 * cov + s[:, None, None, None] ** 2 * eye  # (T, K, d, d): cov of x
        tables = {
            "time_table": torch.tensor(times, dtype=torch.float64),
            "signal_table": a,
            "noise_table": s,
            "scale_table": torch.tensor(head_scale, dtype=torch.float64),
            "component_mean": mean,
            "gain": a[:, None, None, None] * torch.linalg.solve(spread, cov.expand_as(spread)),
            "whiten": torch.linalg.inv(torch.linalg.cholesky(spread)),
            "log_weight": torch.tensor(weights, dtype=torch.float64).log() - 0.5 * torch.logdet(spread),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.head = make_head(head_kind, len(a), dims)

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> tuple[Tensor]:
        """The prediction for states (B, d) at timesteps (B,) or one for all."""
        k = (torch.as_tensor(timestep).to(self.time_table).reshape(-1, 1) - self.time_table).abs().argmin(1)
        k = k.expand(sample.shape[0])
        s = self.noise_table[k, None]
        x0 = self.exact(sample, k) + self.scale_table[k, None] * self.head(sample, k)
        return ((sample - x0) / s if self.config.is_flow else x0,)

    def exact(self, x: Tensor, k: Tensor) -> Tensor:
        """E[x0 | x] of states (B, d) at steps (B,)."""
        residual = x[:, None] - self.signal_table[k, None, None] * self.component_mean  # (B, K, d)
        each = self.component_mean + torch.einsum("bkij,bkj->bki", self.gain[k], residual)
        if each.shape[1] == 1:
            return each[:, 0]
        distance = torch.einsum("bkij,bkj->bki", self.whiten[k], residual).square().sum(-1)
        return torch.einsum("bk,bki->bi", torch.softmax(self.log_weight[k] - 0.5 * distance, dim=1), each)


class ToyPipeline(DiffusionPipeline):
    """Samples vectors of d dimensions with an `ExactDenoiser`; see the module docstring."""

    def __init__(self, transformer: ExactDenoiser, scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler) -> None:
        """Takes a denoiser and the scheduler whose steps it was tabulated for."""
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        *,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        """Samples one vector a prompt.

        Args:
            prompt: B texts, ignored.
            num_inference_steps: T.
            guidance_scale: Ignored.
            generator: Source of the initial noise.
            output_type: `latent` for vectors (B, d), else pictures (B, 3, 1, d) by `to_pixels`.
            return_dict: Ignored.
        """
        self.scheduler.set_timesteps(num_inference_steps)
        dims = self.transformer.component_mean.shape[1]
        latents = randn_tensor((len(prompt), dims), generator=generator, device=self.device)
        for t in self.scheduler.timesteps:
            output = self.transformer(latents, t.expand(len(prompt)), return_dict=False)[0]
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents if output_type == "latent" else to_pixels(latents),)


def toy_pipeline(
    weights: Tensor, means: Tensor, covs: Tensor, sampler: SamplerConfig, *, head: HeadKind = "affine"
) -> ToyPipeline:
    """The pipeline of Gaussian-mixture data for one sampler.

    Its noise schedule is DDPM's linear one (Ho et al. 2020; trailing timesteps) for `ddim`, sigma from 1 to 0 in equal
    steps for flow samplers.

    Args:
        weights: (K,), summing to 1.
        means: (K, d).
        covs: (K, d, d).
        sampler: The sampler that the policy will be given.
        head: What is trained.
    """
    scheduler, schedule = toy_schedule(sampler)
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    denoiser = ExactDenoiser(
        times=schedule.model_time.tolist(),
        signal=schedule.a.tolist(),
        noise=schedule.s.tolist(),
        head_scale=head_scale(schedule, head).tolist(),
        weights=weights.tolist(),
        means=means.tolist(),
        covs=covs.tolist(),
        is_flow=is_flow,
        head_kind=head,
    )
    return ToyPipeline(denoiser, scheduler)


def head_scale(schedule: Schedule, head: HeadKind) -> Tensor:
    """By what a head's output moves the predicted x0 of each step, (T,): see `ddpo.control.diffusion.toy_heads`."""
    return schedule.s if head == "shared" else schedule.std / weight_of_x0(schedule)


def weight_of_x0(schedule: Schedule) -> Tensor:
    """By what a step's mean moves with the predicted x0, (T,): a' x0 + direction (x - a x0) / s."""
    return schedule.a_next - schedule.direction * schedule.a / schedule.s


def toy_schedule(
    sampler: SamplerConfig, *, epoch: int = 0
) -> tuple[DDIMScheduler | FlowMatchEulerDiscreteScheduler, Schedule]:
    """The scheduler and the float64 coefficients of the toy chain for a sampler, with an epoch's noisy steps."""
    is_flow = sampler.kind in ("flow_sde", "dance_sde", "cps")
    scheduler = (
        FlowMatchEulerDiscreteScheduler()
        if is_flow
        else DDIMScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type="sample")
    )
    scheduler.set_timesteps(sampler.num_steps)

    def schedule(sampler: SamplerConfig) -> Schedule:
        grid = noise_grid(scheduler, ends_noisy=sampler.ends_noisy)
        return make_schedule(sampler, grid, model_time=scheduler.timesteps, is_flow=is_flow, clip=None)

    noisy, ode = schedule(sampler), schedule(replace(sampler, kind="ode"))
    return scheduler, epoch_schedule(noisy, ode, sampler.stochastic_steps, epoch=epoch, seed=0)


def to_pixels(latents: Tensor) -> Tensor:
    """Vectors (B, d) as pictures (B, 3, 1, d) in [0, 1], clamped outside +- PIXEL_RANGE / 2."""
    pixels = (0.5 + latents / PIXEL_RANGE).clamp(0, 1)
    return pixels[:, None, None, :].expand(-1, 3, 1, -1).contiguous()


def from_pixels(images: Tensor) -> Tensor:
    """Inverse of `to_pixels`: (B, 3, 1, d) to (B, d)."""
    return (images[:, 0, 0] - 0.5) * PIXEL_RANGE
