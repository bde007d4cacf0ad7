"""From images to latents, against the stock image-to-image pipelines and each VAE's own round trip."""

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ddpo import Policy, SamplerConfig
from ddpo.control.diffusion.toy_pipeline import toy_pipeline
from ddpo.pipeline.tracing import UntraceableError
from ddpo.validation import UserError
from tests.ddpo.families import tiny_flux, tiny_kontext, tiny_sd3, tiny_sdxl
from tests.ddpo.more_families import tiny_cogvideox, tiny_ddpm, tiny_flux2, tiny_pixart, tiny_qwen, tiny_sana, tiny_wan
from tests.ddpo.tools import SIZE, make_policy
from tests.tiny import tiny_stable_diffusion


def pictures(count=2, height=16, width=16):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def make(build, *, height=16, width=16, **options):
    sampler = SamplerConfig(kind="ode", num_steps=2, guidance_scale=4.0, height=height, width=width)
    return Policy(build(), sampler=sampler, **options)


def sdxl_with_statistics():
    """Playground's VAE: a mean and a spread for each channel."""
    pipeline = tiny_sdxl()
    pipeline.vae.register_to_config(latents_mean=[0.5, -1.0, 0.25, 2.0], latents_std=[2.0, 0.5, 1.5, 3.0])
    return pipeline


@pytest.fixture
def noiseless(monkeypatch):
    """Stock pipelines sample their posterior and add noise; here they take its mean and add none."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def start(kind, pipeline, images):
    """What an image-to-image pipeline starts from, before it adds noise."""
    parts = dict(pipeline.components)
    if kind is StableDiffusionImg2ImgPipeline:
        parts["requires_safety_checker"] = False
    stock = kind(**parts)
    stock.scheduler.add_noise = lambda latents, noise, timestep: latents
    stock.scheduler.scale_noise = lambda latents, timestep, noise: latents
    pixels, count = stock.image_processor.preprocess(images), len(images)
    time, common = torch.tensor([1]), (torch.float32, torch.device("cpu"))
    with torch.no_grad():
        if kind is FluxImg2ImgPipeline:
            channels, (height, width) = pipeline.transformer.config.in_channels // 4, images.shape[2:]
            return stock.prepare_latents(pixels, time, count, channels, height, width, *common, None)[0]
        return stock.prepare_latents(pixels, time, count, 1, *common, None)


@pytest.mark.parametrize(
    ("build", "stock"),
    [
        (tiny_stable_diffusion, StableDiffusionImg2ImgPipeline),
        (tiny_sdxl, StableDiffusionXLImg2ImgPipeline),
        (sdxl_with_statistics, StableDiffusionXLImg2ImgPipeline),
        (tiny_sd3, StableDiffusion3Img2ImgPipeline),
        (tiny_flux, FluxImg2ImgPipeline),
    ],
)
@pytest.mark.parametrize("width", [16, 32], ids=["square", "wide"])
def test_latents_of_images_are_those_that_image_to_image_starts_from(build, stock, width, noiseless):
    policy, images = make(build, width=width), pictures(width=width)
    assert torch.equal(policy.encode_images(images), start(stock, build(), images))


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (tiny_stable_diffusion, 16), (tiny_flux, 16), (tiny_kontext, 16), (tiny_flux2, 16), (tiny_pixart, 16),
        (tiny_sana, 32), (tiny_qwen, 16),
    ],
)  # fmt: skip
def test_decoding_the_latents_of_images_is_the_vaes_own_round_trip(build, side):
    policy, images = make(build, height=side, width=side), pictures(height=side, width=side)
    latents = policy.encode_images(images)
    assert latents.shape == (2, *policy.latent_shape) and latents.dtype == torch.float32
    vae, pixels = policy.pipeline.vae, 2 * images - 1
    with torch.no_grad():
        encoded = vae.encode(pixels[:, :, None] if build is tiny_qwen else pixels, return_dict=False)[0]
        z = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
        again = vae.decode(z, return_dict=False)[0]
    again = again[:, :, 0] if build is tiny_qwen else again
    tolerance = 1e-4 if build is tiny_flux2 else 2e-5  # whose scales, of a batch norm, are measured
    torch.testing.assert_close(policy.decode(latents), (again / 2 + 0.5).clamp(0, 1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_vae_that_overflows_in_half_precision_encodes_in_float32(precision):
    """As image-to-image does for SDXL (`force_upcast`); its own latents may then be wider than the network's."""
    policy = make(tiny_sdxl, precision=precision)
    assert policy.pipeline.vae.config.force_upcast
    halved = policy.pipeline.vae.state_dict()
    whole = make(tiny_sdxl)
    whole.pipeline.vae.load_state_dict({name: value.float() for name, value in halved.items()})
    assert torch.equal(policy.encode_images(pictures()), whole.encode_images(pictures()))
    assert policy.pipeline.vae.dtype == policy.denoiser.module.dtype


def test_latents_do_not_depend_on_what_is_encoded_together_or_on_where_the_vae_rests():
    policy = make_policy()
    offloaded = Policy(tiny_stable_diffusion(), sampler=policy.sampler, offload=True)
    images = pictures(3)
    whole = policy.encode_images(images)
    torch.testing.assert_close(policy.encode_images(images[1:2]), whole[1:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(offloaded.encode_images(images), whole)


def test_without_a_vae_images_are_latents_in_minus_one_to_one():
    policy = Policy(tiny_ddpm(), sampler=SamplerConfig(num_steps=2))
    images = pictures(2, *policy.latent_shape[1:])
    latents = policy.encode_images(images)
    assert torch.equal(latents, 2 * images - 1)
    torch.testing.assert_close(policy.decode(latents), images, rtol=0, atol=1e-6)


def test_what_cannot_be_encoded_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"images of 32x32 pixels become latents of shape \(4, 16, 16\), but Stable"):
        make_policy().encode_images(pictures(1, 32, 32))
    with pytest.raises(UntraceableError, match="ToyPipeline has no component vae, and its latents"):
        toy = toy_pipeline(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None], SamplerConfig(num_steps=2))
        Policy(toy, sampler=SamplerConfig(num_steps=2)).encode_images(pictures(1, 1, 2))
    for build, frames in ((tiny_wan, 5), (tiny_cogvideox, 9)):
        video = Policy(build(), sampler=SamplerConfig(kind="ode", num_steps=2, num_frames=frames, **SIZE))
        with pytest.raises(ValueError, match="makes videos of . latent frames"):
            video.encode_images(pictures(1))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ((255 * pictures(1)).to(torch.uint8), r"must be floats of shape .* got uint8 \(1, 3, 16, 16\)"),
        (pictures(1)[:, :1], r"got float32 \(1, 1, 16, 16\)"),
        (pictures(1)[0], r"got float32 \(3, 16, 16\)"),
        (pictures(1).fill_(torch.nan), "values from nan to nan"),
        (2 * torch.ones(1, 3, 16, 16), "values from 2 to 2"),
    ],
)
def test_what_are_no_images_is_not_encoded(images, said):
    with pytest.raises(UserError, match=said):
        make_policy().encode_images(images)


def test_a_tail_that_mixes_entries_is_refused():
    policy = make_policy()
    tail = type(policy.pipeline).__call__

    class Mixing(type(policy.pipeline)):
        @torch.no_grad()
        def __call__(self, *arguments, **options):
            own = self.vae.decode
            self.vae.decode = lambda z, *a, **o: own(z + z.roll(1, -1), *a, **o)
            try:
                return tail(self, *arguments, **options)
            finally:
                self.vae.decode = own

    policy.pipeline.__class__ = Mixing
    with pytest.raises(UntraceableError, match="Mixing .* images cannot be encoded"):
        policy.encode_images(pictures())
