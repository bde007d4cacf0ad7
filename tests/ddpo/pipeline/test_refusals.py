"""Pipelines that no policy can be made of, and what is said."""

import copy

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXVideoToVideoPipeline,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    MarigoldDepthPipeline,
    PNDMScheduler,
    QwenImageEditPlusPipeline,
    SCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)

from ddpo import Policy, SamplerConfig, UntraceableError
from ddpo.loading import load_pipeline
from ddpo.pipeline.scheduler import default_sampler, flow_matching_scheduler, training_scheduler
from tests.ddpo.editing_families import tiny_qwen_edit
from tests.ddpo.families import tiny_flux
from tests.ddpo.more_families import tiny_cogvideox, tiny_ddpm, tiny_wan
from tests.ddpo.tools import SIZE
from tests.tiny import tiny_stable_diffusion

ODE = SamplerConfig(kind="ode", num_steps=2, **SIZE)


def recast(pipeline_class):
    return pipeline_class(**dict(tiny_stable_diffusion().components), requires_safety_checker=False)


class WithoutScheduler(StableDiffusionPipeline):
    @property
    def components(self):
        return {name: part for name, part in super().components.items() if name != "scheduler"}


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


class TwoTimes(StableDiffusionPipeline):
    """Its timesteps are as many as its branches, whatever the batch, and its pictures are latents."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            both = torch.cat([latents, latents])
            output = self.unet(both, t.view(1).repeat(2), encoder_hidden_states=embeddings).sample
            negative, positive = output.chunk(2)
            guided = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return (latents,)


class WithSound(StableDiffusionPipeline):
    """Steps a second chain by a copy of its scheduler, as LTX-2 its audio."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator):
        embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
        self.scheduler.set_timesteps(num_inference_steps)
        other = copy.deepcopy(self.scheduler)
        latents = sound = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, encoder_hidden_states=embeddings).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            sound = other.step(-output, t, sound, return_dict=False)[0]
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
        (
            StableDiffusionInpaintPipeline,
            "StableDiffusionInpaintPipeline changes the latents between its scheduler's steps",
        ),
        (StableDiffusionImg2ImgPipeline, "StableDiffusionImg2ImgPipeline starts from an image with noise on it"),
        (WithoutScheduler, "WithoutScheduler has no scheduler"),
        (LateGuidance, "LateGuidance calls its denoiser differently at different steps"),
        (FadingPrompt, "FadingPrompt changes encoder_hidden_states of its denoiser from step to step"),
        (FadingGuidance, "FadingGuidance guides differently at different steps"),
        (TwoTimes, r"TwoTimes makes \(1, 4, 8, 8\) of one latent where a picture is \(1, 3, H, W\)"),
        (WithSound, "WithSound steps more than one chain with each call of its denoiser, such as sound beside a video"),
        (SkipsSteps, "SkipsSteps makes 1 steps where its scheduler has 2"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused_with_the_reason(pipeline_class, message):
    with pytest.raises(UntraceableError, match=message):
        Policy(recast(pipeline_class), sampler=SamplerConfig(kind="ode", num_steps=2))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler .* its model is an EDM model, a family without a sampler here"),
        (SCMScheduler(), "SCMScheduler .* its model is distilled .* a family without a sampler here"),
        (CMStochasticIterativeScheduler(), "its model is a consistency model, a family without a sampler here"),
        (FlowMatchLCMScheduler(), "its model is distilled for a few steps, of a family without a sampler here"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_of_another_family_is_refused_without_advice_that_would_make_a_wrong_model(scheduler, message):
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message) as refusal:
        Policy(pipeline, sampler=ODE)
    assert "DDIMScheduler" not in str(refusal.value)


def test_a_distilled_model_is_refused_and_the_named_cure_samples_it_from_pure_noise():
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with pytest.raises(ValueError, match="TCDScheduler samples a distilled model") as refusal:
        Policy(pipeline, sampler=ODE)
    assert "LCMScheduler.from_config(pipeline.scheduler.config)" in str(refusal.value)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    policy = Policy(pipeline, sampler=default_sampler(pipeline.scheduler, num_steps=4))
    assert policy.sampler.kind == "lcm"
    assert policy.schedule.model_time.tolist() == [999, 759, 499, 259]


def test_consistency_sampling_and_models_distilled_to_it_go_together():
    with pytest.raises(ValueError, match=r"sampler\.kind must be another with this model \(lcm is for one with LCMSch"):
        Policy(tiny_stable_diffusion(), sampler=SamplerConfig(kind="lcm", num_steps=2, **SIZE))
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="sampler.kind must be lcm or ode with LCMScheduler"):
        Policy(pipeline, sampler=SamplerConfig(kind="ddim", num_steps=2, **SIZE))


def test_every_replacement_of_a_scheduler_is_said_in_one_line(caplog):
    for solver in (PNDMScheduler(), DPMSolverMultistepScheduler(use_karras_sigmas=True)):
        caplog.clear()
        training_scheduler(training_scheduler(solver))
        (line,) = caplog.messages
        assert line.startswith(f"{type(solver).__name__} is replaced by DDIMScheduler on the same noise levels")
    caplog.clear()
    flow_matching_scheduler(UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    (line,) = caplog.messages
    assert line.startswith("UniPCMultistepScheduler is replaced by FlowMatchEulerDiscreteScheduler")


def test_a_chain_that_starts_where_much_signal_is_expected_is_said(caplog):
    Policy(tiny_stable_diffusion(), sampler=SamplerConfig(kind="ode", num_steps=4, **SIZE))
    (line,) = [message for message in caplog.messages if "pure noise" in message]
    assert "at timestep 751, where the model expects 24% of a picture's signal" in line
    caplog.clear()
    Policy(tiny_stable_diffusion(), sampler=SamplerConfig(kind="ode", num_steps=8, **SIZE))
    assert not any("pure noise" in message for message in caplog.messages)


def test_a_replaced_scheduler_starts_where_the_pipelines_own_does():
    """unCLIP's knows no spacing; with DDIMScheduler's default the chain would start at 900 of 999."""
    own = UnCLIPScheduler()
    replaced = training_scheduler(own)
    for scheduler in (own, replaced):
        scheduler.set_timesteps(10)
    assert own.timesteps[0] == replaced.timesteps[0] == 999


def controlled():
    part = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 8}
    control = ControlNetModel(**part, **blocks, conditioning_embedding_out_channels=(16, 32))
    parts = tiny_stable_diffusion().components
    return StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)


def perturbed_attention():
    parts = tiny_stable_diffusion().components
    return StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"], requires_safety_checker=False)


def with_ip_adapter():
    pipeline = tiny_stable_diffusion()
    cross = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    layers = {f"{2 * i + 1}.to_{p}_ip.weight": torch.randn(64, 32) for i in range(len(cross)) for p in "kv"}
    projection = {
        "proj.weight": torch.randn(128, 32), "proj.bias": torch.randn(128),
        "norm.weight": torch.randn(32), "norm.bias": torch.randn(32),
    }  # fmt: skip
    pipeline.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipeline


def cached():
    pipeline = tiny_flux()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    return pipeline


def marigold():
    parts = tiny_stable_diffusion().components
    return MarigoldDepthPipeline(**{name: parts[name] for name in (
        "unet", "vae", "scheduler", "text_encoder", "tokenizer")})  # fmt: skip


@pytest.mark.parametrize(
    ("build", "cure"),
    [
        (controlled, "steered by a picture for its controlnet .*; take the model's pipeline without"),
        (perturbed_attention, "load the weights by the pipeline class without PAG in its name"),
        (with_ip_adapter, r"pipeline\.unload_ip_adapter\(\)"),
        (cached, r"switch it off by its disable_cache\(\)"),
        (marigold, "makes its pictures of an image without a prompt"),
        (
            lambda: QwenImageEditPlusPipeline(**tiny_qwen_edit().components),
            "called from prompts, an image for each, and noise at 16x16 pixels: ",
        ),
        (lambda: CogVideoXVideoToVideoPipeline(**tiny_cogvideox().components), r"\(it also takes video\)"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_with_what_to_do(build, cure):
    with pytest.raises(UntraceableError, match=cure) as refusal:
        pipeline = build()
        size = SIZE if "Qwen" in type(pipeline).__name__ else {}
        Policy(pipeline, sampler=SamplerConfig(kind=default_sampler(pipeline.scheduler).kind, num_steps=2, **size))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"height": 16, "width": 16},
            "sampler.height must be left out with DDPMPipeline, which takes no height",
        ),
        (
            {"guidance_rescale": 0.5},
            "sampler.guidance_rescale must be left out with DDPMPipeline",
        ),
        ({"num_frames": 5}, "sampler.num_frames must be left out with DDPMPipeline"),
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
