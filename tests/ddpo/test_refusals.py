"""Pipelines that no policy can be made of, and what is said."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)

from ddpo import Policy, SamplerConfig, UntraceableError
from ddpo.loading import load_pipeline
from ddpo.samplers import default_sampler
from ddpo.schedule import flow_matching_scheduler
from tests.ddpo.more_families import tiny_cogview4, tiny_ddpm, tiny_wan
from tests.ddpo.tools import SIZE
from tests.tiny import tiny_stable_diffusion

ODE = SamplerConfig(kind="ode", num_steps=2, **SIZE)


def recast(pipeline_class):
    return pipeline_class(**dict(tiny_stable_diffusion().components), requires_safety_checker=False)


class WithoutScheduler(StableDiffusionPipeline):
    @property
    def components(self):
        return {name: part for name, part in super().components.items() if name != "scheduler"}


class StylePipeline(StableDiffusionPipeline):
    """Its text embeddings are shifted by the mean prompt of the batch, in one row for all."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
        style = embeddings.mean((0, 1), keepdim=True)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, encoder_hidden_states=embeddings, timestep_cond=style).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


class LateGuidance(StableDiffusionPipeline):
    """Guides from the second step on."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for index, t in enumerate(self.scheduler.timesteps):
            for _ in range(1 + (index > 0)):
                output = self.unet(latents, t, encoder_hidden_states=embeddings).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


class FadingPrompt(StableDiffusionPipeline):
    """Its text embeddings fade from step to step."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for index, t in enumerate(self.scheduler.timesteps):
            faded = embeddings * (1 - index / num_inference_steps)
            output = self.unet(latents, t, encoder_hidden_states=faded).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


class FadingGuidance(StableDiffusionPipeline):
    """Its guidance scale falls from step to step, with the same calls of the denoiser."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for index, t in enumerate(self.scheduler.timesteps):
            output = self.unet(torch.cat([latents, latents]), t, encoder_hidden_states=embeddings).sample
            negative, positive = output.chunk(2)
            scale = guidance_scale * (1 - index / num_inference_steps)
            guided = negative + scale * (positive - negative)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return (latents,)


class SkipsSteps(StableDiffusionPipeline):
    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.scheduler.timesteps[1:]:
            output = self.unet(latents, t, encoder_hidden_states=embeddings).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        return (latents,)


@pytest.mark.parametrize(
    ("pipeline_class", "message"),
    [
        (StableDiffusionInpaintPipeline, "StableDiffusionInpaintPipeline needs mask_image besides a prompt"),
        (StableDiffusionImg2ImgPipeline, "StableDiffusionImg2ImgPipeline starts from an image with noise on it"),
        (WithoutScheduler, "WithoutScheduler has no scheduler"),
        (StylePipeline, "timestep_cond of UNet2DConditionModel depends on the prompts"),
        (LateGuidance, "LateGuidance calls its denoiser differently at different steps"),
        (FadingPrompt, "FadingPrompt changes encoder_hidden_states of its denoiser from step to step"),
        (FadingGuidance, "FadingGuidance guides differently at different steps"),
        (SkipsSteps, "SkipsSteps makes 1 steps where its scheduler has 2"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused_with_the_reason(pipeline_class, message):
    with pytest.raises(UntraceableError, match=message):
        Policy(recast(pipeline_class), sampler=SamplerConfig(kind="ode", num_steps=2))


def test_a_pipeline_that_switches_transformers_is_refused():
    stock = tiny_wan()
    pipeline = WanPipeline(**{**stock.components, "transformer_2": tiny_wan(seed=1).transformer}, boundary_ratio=0.5)
    with pytest.raises(UntraceableError, match="WanPipeline switches between transformer and transformer_2; use one"):
        Policy(pipeline, sampler=ODE)


def test_embeddings_padded_to_a_multiple_of_tokens_without_a_mask_are_refused():
    """CogView4's are 16 tokens long for all short prompts, and as long as the longest of a batch for others."""
    with pytest.raises(UntraceableError, match="encoder_hidden_states of CogView4.* longest prompt, and 0 masks"):
        Policy(tiny_cogview4(), sampler=SamplerConfig(kind="ode", num_steps=2, **SIZE))


def test_an_unsupported_scheduler_is_refused_with_what_is_supported():
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler .*Give the pipeline a DDIMScheduler or a FlowMatch"):
        Policy(pipeline, sampler=ODE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 16, "width": 16}, "sampler.height is 16, but DDPMPipeline takes no height; leave it out"),
        ({"guidance_rescale": 0.5}, "sampler.guidance_rescale is 0.5, but DDPMPipeline takes no guidance_rescale"),
        ({"num_frames": 5}, "sampler.num_frames is 5, but DDPMPipeline takes no num_frames"),
    ],
)
def test_an_option_that_the_pipeline_lacks_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Policy(tiny_ddpm(), sampler=SamplerConfig(kind="ode", num_steps=2, **options))


@pytest.mark.parametrize(("field", "value"), [("guidance_rescale", 1.5), ("guidance_rescale", -0.1), ("num_frames", 0)])
def test_a_sampler_option_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        SamplerConfig(**{field: value})


@pytest.mark.parametrize("solver", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_flow_matching_solver_becomes_flow_matching_euler_of_the_same_shift(solver):
    """Sana's and Wan's own schedulers: both walk sigma = shift t / (1 + (shift - 1) t) from 1 down to 0."""
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    published = solver(**options)
    euler = flow_matching_scheduler(published)
    assert isinstance(euler, FlowMatchEulerDiscreteScheduler)
    published.set_timesteps(10)
    euler.set_timesteps(10)
    t = torch.linspace(1, 0.001, 1000, dtype=torch.float64)
    curve = 3 * t / (1 + 2 * t)
    for sigmas in (published.sigmas[:-1], euler.sigmas[:-1]):
        assert torch.cdist(sigmas.double()[:, None], curve[:, None]).min(1).values.max() < 1e-3
    torch.testing.assert_close(euler.timesteps / 1000, euler.sigmas[:-1])


def test_other_schedulers_stay():
    for scheduler in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler(shift=2.0), DPMSolverMultistepScheduler()):
        assert flow_matching_scheduler(scheduler) is scheduler


def test_the_default_sampler_fits_the_model(tmp_path):
    assert default_sampler(DDIMScheduler()) == SamplerConfig()
    flow = default_sampler(FlowMatchEulerDiscreteScheduler(), num_steps=4)
    assert (flow.kind, flow.eta, flow.num_steps) == ("flow_sde", 0.7, 4)
    pipeline = tiny_wan()
    pipeline.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=torch.float32)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler) and loaded.scheduler.config.shift == 3.0
