"""What is found at a pipeline's tail, and about its chance, when a policy is made."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLMochi,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    MochiPipeline,
    MochiTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DModel,
    VQModel,
)

from ddpo import FullConfig, Policy, SamplerConfig, UntraceableError, rollout
from ddpo.pipeline.tail import check_tail
from tests.ddpo.families import tiny_flux, tiny_sdxl, tiny_t5, tiny_vae
from tests.ddpo.tools import SIZE, make_policy, prior
from tests.tiny import tiny_stable_diffusion

ODE = SamplerConfig(kind="ode", num_steps=3, guidance_scale=1.0, **SIZE)


class Watermarker:
    """The interface of the one that diffusers puts into SDXL; it works in numpy, too."""

    def apply_watermark(self, images):
        return torch.from_numpy(images.detach().numpy() * 0)


def test_rewards_see_no_watermark_and_gradients_reach_the_latents():
    marked, plain = tiny_sdxl(), tiny_sdxl()
    marked.watermark = Watermarker()
    policy, other = Policy(marked, sampler=ODE), Policy(plain, sampler=ODE)
    latents = prior(policy, 2).requires_grad_()
    images = policy.decode(latents, with_gradient=True)
    assert torch.equal(images.detach(), other.decode(latents.detach()))
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.abs().sum() > 0
    assert isinstance(marked.watermark, Watermarker), "the pipeline keeps it"


def tiny_pixart_alpha():
    tokenizer, t5 = tiny_t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=t5, vae=tiny_vae(), scheduler=DDIMScheduler(), transformer=transformer
    )


def tiny_mochi():
    tokenizer, t5 = tiny_t5()
    vae = AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    transformer = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=256,
    )  # fmt: skip
    return MochiPipeline(
        tokenizer=tokenizer, text_encoder=t5, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae,
        transformer=transformer,
    )  # fmt: skip


@pytest.mark.parametrize(("build", "options"), [(tiny_pixart_alpha, {}), (tiny_mochi, {"num_frames": 7})])
def test_a_pipeline_that_treats_a_single_step_in_its_own_way_decodes(build, options):
    policy = Policy(build(), sampler=SamplerConfig(kind="ode", num_steps=3, guidance_scale=1.0, **SIZE, **options))
    assert policy.decode(prior(policy, 2)).shape == (2, 3, 16, 16)


def tiny_kandinsky3():
    tokenizer, t5 = tiny_t5()
    movq = VQModel(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), norm_num_groups=8, norm_type="spatial",
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip
    unet = Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    return Kandinsky3Pipeline(
        tokenizer=tokenizer, text_encoder=t5, scheduler=DDPMScheduler(clip_sample=True), unet=unet, movq=movq
    )


class NoisyPrompt(StableDiffusionPipeline):
    """Its embeddings are augmented by noise of the caller's generator."""

    def encode_prompt(self, *arguments, **options):
        positive, negative = super().encode_prompt(*arguments, **options)
        return positive + 0.3 * torch.randn(positive.shape, generator=self.generator), negative

    def __call__(self, prompt, *, height=16, width=16, generator=None, guidance_scale=1.0, **options):
        self.generator = generator
        options = {**options, "generator": generator, "guidance_scale": guidance_scale}
        return super().__call__(prompt, height=height, width=width, **options)


class KeepsBorder(FluxKontextPipeline):
    """Its final picture is blended with the input image."""

    @torch.no_grad()
    def __call__(self, image=None, prompt=None, *, height=16, width=16, max_area=256, _auto_resize=False, **options):
        options = {**options, "max_area": max_area, "_auto_resize": _auto_resize, "return_dict": False}
        made = super().__call__(image, prompt, height=height, width=width, **options)
        if options["output_type"] == "latent":
            return made
        return (0.5 * made[0] + 0.5 * (self.image_processor.preprocess(image, height, width) * 0.5 + 0.5),)


class Changed(StableDiffusionPipeline):
    """Does something to its finished pictures."""

    @torch.no_grad()
    def __call__(self, prompt, *, height=16, width=16, guidance_scale=1.0, return_dict=True, **options):
        size = {"height": height, "width": width, "guidance_scale": guidance_scale}
        made = super().__call__(prompt, **size, **options, return_dict=False)[0]
        return (made if options["output_type"] == "latent" else self.change(made, prompt),)


class Caption(Changed):
    def change(self, images, prompt):
        return images / (1 + len(prompt[0]))


class Grain(Changed):
    def change(self, images, prompt):
        return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)


class TwoChannels(Changed):
    def change(self, images, prompt):
        return images[:, :2]


def recast(pipeline_class):
    return pipeline_class(**dict(tiny_stable_diffusion().components), requires_safety_checker=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            tiny_kandinsky3,
            r"Kandinsky3Pipeline makes pictures with values from -\d.* rewards take pictures in \[0, 1\]",
        ),
        (
            lambda: recast(TwoChannels),
            r"makes \(1, 2, 16, 16\) of one latent where a picture is \(1, 3, H, W\)",
        ),
        (lambda: recast(NoisyPrompt), "NoisyPrompt draws encoder_hidden_states of its denoiser at random"),
        (lambda: KeepsBorder(**tiny_flux().components), "KeepsBorder makes its pictures of the input image besides"),
        (lambda: recast(Caption), "Caption makes its pictures of the prompt besides the final latents"),
        (lambda: recast(Grain), "Grain draws at random while it makes a picture of its final latents"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_when_a_policy_is_made(build, message):
    with pytest.raises(UntraceableError, match=message):
        Policy(build(), sampler=ODE)


def test_looking_at_the_tail_leaves_the_decoder_and_the_random_state_as_they_were():
    policy = make_policy(num_steps=2)
    latents = prior(policy, 1)
    before, state = policy.decode(latents), torch.get_rng_state()
    check_tail(policy._view.wiring.decoder, policy.latent_shape, device=policy.device)
    assert torch.equal(policy.decode(latents), before) and torch.equal(torch.get_rng_state(), state)
    assert not policy.pipeline.vae.use_tiling


def test_a_vae_that_decodes_in_tiles_alone_is_set_to_do_so(caplog):
    """AutoencoderKLAllegro raises NotImplementedError without tiling; its latents are decoded after a good load."""

    class OnlyInTiles(AutoencoderKL):
        def _decode(self, z, return_dict=True):
            if not self.use_tiling:
                raise NotImplementedError("Decoding without tiling has not been implemented yet.")
            return super()._decode(z, return_dict)

    pipeline = tiny_stable_diffusion()
    vae = OnlyInTiles.from_config(pipeline.vae.config)
    vae.load_state_dict(pipeline.vae.state_dict())
    pipeline.register_modules(vae=vae)
    policy, plain = Policy(pipeline, sampler=ODE), Policy(tiny_stable_diffusion(), sampler=ODE)
    latents = prior(policy, 2)
    assert torch.equal(policy.decode(latents), plain.decode(latents))
    assert "OnlyInTiles decodes in tiles alone; it is set to do so" in caplog.messages


def test_a_tail_that_takes_one_latent_at_a_time_is_given_one():
    """HunyuanVideo 1.5's VAE has an attention mask that fits a single video."""

    class OneLatent(AutoencoderKL):
        def _decode(self, z, return_dict=True):
            if len(z) > 1:
                raise RuntimeError("output with shape [2, 1, 2, 2] doesn't match the broadcast shape [2, 2, 2, 2]")
            return super()._decode(z, return_dict)

    pipeline = tiny_stable_diffusion()
    vae = OneLatent.from_config(pipeline.vae.config)
    vae.load_state_dict(pipeline.vae.state_dict())
    pipeline.register_modules(vae=vae)
    policy, plain = Policy(pipeline, sampler=ODE), Policy(tiny_stable_diffusion(), sampler=ODE)
    assert policy.call.alone and policy.with_sampler(SamplerConfig(num_steps=2, **SIZE)).call.alone
    assert not plain.call.alone
    latents = prior(policy, 2)
    torch.testing.assert_close(policy.decode(latents), plain.decode(latents), rtol=0, atol=1e-6)


def test_a_pipeline_of_one_channel_makes_grey_pictures_of_three_equal_ones():
    """In pixel space a picture is its final latents, moved to [0, 1]."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    network = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8, **blocks)
    policy = Policy(
        DDPMPipeline(network, DDPMScheduler()),
        sampler=SamplerConfig(num_steps=2, guidance_scale=1.0),
        adapter=FullConfig(),
        device="cpu",
    )
    latents = rollout(policy, policy.encode([""]), torch.tensor([3])).final.requires_grad_()
    images = policy.decode(latents, with_gradient=True)
    assert images.shape == (1, 3, 8, 8)
    torch.testing.assert_close(images, (latents / 2 + 0.5).clamp(0, 1).expand(1, 3, 8, 8))
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    inside = (latents.abs() < 1).float()
    torch.testing.assert_close(gradient * inside, 1.5 * inside)
