"""How a stock pipeline is learnt, and which pipelines are refused."""

import logging

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline

from ddpo import Policy, SamplerConfig, UntraceableError
from ddpo.pipeline.nested import flatten, unflatten
from ddpo.pipeline.tracing import trace
from tests.ddpo.tools import PROMPTS, SIZE, counting_calls, make_policy, prior, record_stock
from tests.tiny import tiny_stable_diffusion


@pytest.mark.parametrize(("guidance", "rule"), [(1.0, "none"), (5.0, "stacked")])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_replayed_model_outputs_equal_the_stock_pipelines_exactly_at_every_step(prediction, guidance, rule):
    policy = make_policy(
        pipeline=tiny_stable_diffusion(prediction_type=prediction), kind="ode", guidance_scale=guidance, adapter=None
    )
    assert policy.rule.name == rule
    _, steps = record_stock(
        tiny_stable_diffusion(prediction_type=prediction), prompt=PROMPTS, latents=prior(policy, 4),
        guidance_scale=guidance, num_inference_steps=4, output_type="latent", **SIZE,
    )  # fmt: skip
    condition = policy.encode(PROMPTS)
    assert len(steps) == policy.schedule.num_steps
    with torch.no_grad():
        for k, (timestep, sample, model_output) in enumerate(steps):
            assert policy.schedule.model_time[k] == timestep
            branches = policy.denoiser.branches(sample, policy.schedule.model_time[k].expand(4), condition, policy.rule)
            output = policy.rule.combine(*branches, guidance)
            assert (output - model_output).abs().max() == 0, k


def test_what_a_loop_writes_over_its_latents_is_recorded_as_it_was():
    """Kandinsky 5 writes the next latents into the tensor of the last ones."""

    class InPlace(StableDiffusionPipeline):
        def __call__(self, prompt, *, num_inference_steps, generator):
            embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
            self.scheduler.set_timesteps(num_inference_steps)
            latents = torch.randn(1, 4, 8, 8, generator=generator)
            for t in self.scheduler.timesteps:
                output = self.unet(latents, t, encoder_hidden_states=embeddings).sample
                latents[:] = self.scheduler.step(output, t, latents, return_dict=False)[0]

    pipeline = InPlace(**dict(tiny_stable_diffusion().components), requires_safety_checker=False)
    arguments = {"prompt": ["a"], "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    with torch.no_grad():
        steps = trace(pipeline, pipeline.unet, arguments, hollow=False)
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(steps[0].sample, first) and torch.equal(steps[0].calls[0].latents, first)
    assert not torch.equal(steps[1].sample, first)


def test_hollow_tracing_never_runs_the_denoiser():
    pipeline = tiny_stable_diffusion()
    arguments = {"prompt": PROMPTS, "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "latent"}
    with counting_calls(pipeline.unet.conv_in) as calls:
        steps = trace(pipeline, pipeline.unet, arguments)
    assert len(steps) == 5 and calls == []
    assert steps[0].calls[0].latents.shape[0] == 8 and steps[0].sample.shape[0] == 4


def test_encoding_and_decoding_never_run_the_denoiser():
    policy = make_policy()
    with counting_calls(policy.pipeline.unet.conv_in) as calls:
        policy.encode(PROMPTS)
        policy.decode(prior(policy, 2))
    assert calls == []


def test_loading_runs_the_denoiser_a_handful_of_times():
    pipeline = tiny_stable_diffusion()
    with counting_calls(pipeline.unet.conv_in) as calls:
        make_policy(pipeline=pipeline, num_steps=50)
    assert len(calls) <= 4


def test_tracing_leaves_the_pipeline_as_it_was():
    pipeline, arguments = tiny_stable_diffusion(), {"prompt": PROMPTS[:1], "num_inference_steps": 2, **SIZE}

    def image():
        return pipeline(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt").images

    before = image()
    trace(pipeline, pipeline.unet, arguments, num_steps=1)
    with pytest.raises(ZeroDivisionError):
        trace(pipeline, pipeline.unet, {**arguments, "callback_on_step_end": lambda *_: 1 / 0})
    assert torch.equal(image(), before)
    assert "forward" not in vars(pipeline.unet) and "step" not in vars(pipeline.scheduler)


class NoDenoiser(DiffusionPipeline):
    def __init__(self, vae, scheduler):
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


class TwoDenoisers(DiffusionPipeline):
    def __init__(self, unet, transformer, scheduler):
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer, scheduler=scheduler)


class NormPreserving(StableDiffusionPipeline):
    """Guides in a way of its own: the guided prediction keeps the norm of the conditional one."""

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator, **size):
        embeddings = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 16, 16, generator=generator)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([latents, latents]), t, encoder_hidden_states=embeddings).sample
            negative, positive = output.chunk(2)
            guided = negative + guidance_scale * (positive - negative)
            guided = guided * (positive.norm() / guided.norm())
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return (latents,)


class StepsWithoutDenoising(StableDiffusionPipeline):
    def __call__(self, prompt, *, num_inference_steps, **options):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.zeros(len(prompt), 4, 16, 16)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(latents, t, latents, return_dict=False)[0]
        return (latents,)


def recast(pipeline_class):
    parts = dict(tiny_stable_diffusion().components)
    return pipeline_class(**parts, requires_safety_checker=False)


def test_a_pipeline_without_a_denoiser_is_refused():
    stock = tiny_stable_diffusion()
    with pytest.raises(UntraceableError, match="NoDenoiser has 0 denoisers.*vae"):
        make_policy(pipeline=NoDenoiser(stock.vae, stock.scheduler))


def test_a_pipeline_with_two_denoisers_is_refused():
    stock = tiny_stable_diffusion()
    with pytest.raises(UntraceableError, match="TwoDenoisers has 2 denoisers"):
        make_policy(pipeline=TwoDenoisers(stock.unet, stock.unet, stock.scheduler))


def test_a_pipeline_with_a_guidance_of_its_own_is_refused_with_what_would_switch_it_off():
    message = r"guidance is none that can be reproduced.*the nearest rule, stacked.*, is off by .*guidance_scale 1"
    with pytest.raises(UntraceableError, match=message):
        make_policy(pipeline=recast(NormPreserving), height=None, width=None)


def test_a_pipeline_that_does_not_call_its_denoiser_is_refused():
    with pytest.raises(UntraceableError, match="StepsWithoutDenoising does not call its denoiser"):
        make_policy(pipeline=recast(StepsWithoutDenoising), height=None, width=None)


def test_a_pipeline_without_prompts_is_refused_with_a_message():
    stock = tiny_stable_diffusion()
    with pytest.raises(UntraceableError, match="DDPMPipeline"):
        make_policy(pipeline=DDPMPipeline(unet=stock.unet, scheduler=stock.scheduler), height=None, width=None)


def test_flatten_and_unflatten_are_inverse_and_drop_defaults():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "none": None}
    assert flatten(nested) == {"a": 1, "b.c": 2, "b.d.e": 3}
    assert unflatten(flatten(nested)) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


def test_a_users_long_prompt_is_warned_of_and_the_probes_own_is_not(monkeypatch):
    heard = []
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [Listener(heard)])
    policy = Policy.from_pretrained("shapes", sampler=SamplerConfig(num_steps=2, guidance_scale=1.0))
    assert heard == []
    policy.encode(["a red circle and " * 10])
    assert any("truncated" in message for message in heard)


class Listener(logging.Handler):
    def __init__(self, heard):
        super().__init__()
        self.heard = heard

    def emit(self, record):
        self.heard.append(record.getMessage())
