"""From latents to images, where the pipeline's tail alone would not do."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from ddpo import Policy, SamplerConfig
from tests.ddpo.families import tiny_kontext, tiny_sdxl
from tests.ddpo.tools import SIZE, make_policy, prior
from tests.tiny import tiny_stable_diffusion

SAMPLER = SamplerConfig(kind="ode", num_steps=2, **SIZE)


def suspicious_pipeline():
    """Stable Diffusion with a safety checker that takes offence at every image."""
    part = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**part, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(projection_dim=8, vision_config=vision, text_config=part))
    checker.concept_embeds_weights.data.fill_(-10.0)
    eyes = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {**tiny_stable_diffusion().components, "safety_checker": checker, "feature_extractor": eyes}
    return StableDiffusionPipeline(**parts)


def test_images_are_decoded_without_the_safety_checker_which_stays_in_the_pipeline():
    policy, plain = make_policy(pipeline=suspicious_pipeline()), make_policy()
    latents = prior(policy, 2)
    assert torch.equal(policy.decode(latents), plain.decode(latents))
    checker = policy.pipeline.safety_checker
    assert isinstance(checker, StableDiffusionSafetyChecker)
    stock = policy.pipeline(["a", "b"], num_inference_steps=1, output_type="pt", **SIZE).images
    assert stock.eq(0).all(), "the stock pipeline blackens every image"


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_kontext])
def test_the_gradient_through_a_vae_that_needs_float32_is_float32s(build):
    """The oracle is a policy in float32 whose VAE's weights were rounded to float16 and back."""
    half, single = build(), build()
    assert half.vae.config.force_upcast
    single.vae.half().float()
    gradients = []
    for policy in (Policy(half, sampler=SAMPLER, precision="fp16"), Policy(single, sampler=SAMPLER)):
        latents = prior(policy, 1).requires_grad_()
        images = policy.decode(latents, with_gradient=True)
        weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
        gradients += torch.autograd.grad((images * weights).sum(), latents)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-3
    assert half.vae.dtype == torch.float16, "the pipeline's own VAE is as it was"


def test_images_with_gradient_are_those_without_up_to_the_rounding_of_latents():
    """Without gradient the latents come to the VAE as the loop has them, in float16."""
    policy = Policy(tiny_sdxl(), sampler=SAMPLER, precision="fp16")
    latents = prior(policy, 1)
    rounded = latents.half().float()
    assert torch.equal(policy.decode(rounded, with_gradient=True), policy.decode(latents))
