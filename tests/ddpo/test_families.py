"""SDXL, Stable Diffusion 3 and FLUX through the same code as Stable Diffusion, with the stock pipelines as oracles."""

import pytest
import torch
from diffusers import DDIMScheduler

from ddpo import LoraConfig, Policy, SamplerConfig, rollout
from tests.ddpo.families import tiny_flux, tiny_sd3, tiny_sdxl
from tests.ddpo.tools import perturb, prior, record_stock

PROMPTS = ["a cat", "two dogs"]
FAMILIES = {"sdxl": (tiny_sdxl, "ddim"), "sd3": (tiny_sd3, "flow_sde"), "flux": (tiny_flux, "flow_sde")}
SIZE = {"height": 16, "width": 16}


def stock(family):
    pipeline = FAMILIES[family][0]()
    pipeline.set_progress_bar_config(disable=True)
    if family == "sdxl":  # the DDIM sampler of the Euler scheduler's noise schedule
        options = {"clip_sample": False, "set_alpha_to_one": False}
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    return pipeline


def make(family, kind=None):
    build, sampler = FAMILIES[family]
    config = SamplerConfig(kind=kind or sampler, num_steps=3, guidance_scale=4.0, **SIZE)
    return Policy(build(), sampler=config, adapter=LoraConfig(rank=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_output_and_the_image_equal_the_stock_pipelines(family):
    policy = make(family, "ode")
    latents, condition = prior(policy, 2), policy.encode(PROMPTS)
    result, steps = record_stock(
        stock(family), prompt=PROMPTS, latents=latents, guidance_scale=4.0, num_inference_steps=3, output_type="pt",
        **SIZE,
    )  # fmt: skip
    with torch.no_grad():
        for k, (_, sample, model_output) in enumerate(steps):
            time = policy.schedule.model_time[k].expand(2)
            branches = policy.denoiser.branches(sample, time, condition, policy.rule)
            output = policy.rule.combine(*branches, policy.sampler.guidance_scale)
            assert (output - model_output).abs().max() == 0, k
    final = rollout(policy, condition, torch.arange(2), latents=latents).final
    torch.testing.assert_close(policy.decode(final), result.images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_mixed_steps_equal_the_rollouts(family):
    policy = make(family)
    perturb(policy, scale=0.05)
    trajectory = rollout(policy, policy.encode(PROMPTS), torch.arange(2), with_kl=True)
    rows, steps = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    now = policy(steps, trajectory.latents[rows, steps], trajectory.condition.index(rows))
    difference = now.log_prob(trajectory.latents[rows, steps + 1]) - trajectory.log_probs[rows, steps]
    assert difference.abs().max() / trajectory.latents[0, 0].numel() < 1e-5
    assert trajectory.kl.isfinite().all() and (trajectory.kl.sum(1) > 0).all()
    difference.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_loads_into_the_stock_pipeline(family, tmp_path):
    policy = make(family, "ode")
    perturb(policy, scale=0.05)
    policy.save(tmp_path)
    latents = prior(policy, 2)
    ours = policy.decode(rollout(policy, policy.encode(PROMPTS), torch.arange(2), latents=latents).final)
    pipeline = stock(family)
    pipeline.load_lora_weights(str(tmp_path))
    theirs = pipeline(
        PROMPTS, latents=latents, guidance_scale=4.0, num_inference_steps=3, output_type="pt", **SIZE
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
