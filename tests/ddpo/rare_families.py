"""Tiny random pipelines that call their denoiser in rarer ways."""

import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImageEditPlusPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2Model

from tests.ddpo.editing_families import tiny_qwen_edit
from tests.ddpo.families import tiny_t5, tiny_vae
from tests.ddpo.more_families import character_tokenizer, language_model, tiny_cogvideox, tiny_wan
from tests.tiny import tiny_stable_diffusion


def tiny_qwen_edit_plus(*, seed=0):
    """Qwen-Image-Edit-Plus: one prompt with its images at a time."""
    return QwenImageEditPlusPipeline(**tiny_qwen_edit(seed=seed).components)


def tiny_wan_i2v(*, seed=0):
    """Wan image to video: a mask and the image's latents in channels after the noise, one image at a time."""
    parts = tiny_wan(seed=seed).components
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4 + 2 + 4, out_channels=4, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    kept = ("tokenizer", "text_encoder", "vae", "scheduler")
    return WanImageToVideoPipeline(
        **{name: parts[name] for name in kept}, transformer=transformer, image_processor=None, image_encoder=None
    )


def tiny_wan_experts(*, seed=0):
    """Wan 2.2: one network for the noisy half of the chain, another for the rest."""
    second = tiny_wan(seed=seed + 1).transformer
    return WanPipeline(**{**tiny_wan(seed=seed).components, "transformer_2": second}, boundary_ratio=0.8)


def tiny_cogvideox_i2v(*, seed=0):
    """CogVideoX image to video: the image's latents in channels, which stand after the frames."""
    parts = tiny_cogvideox(seed=seed).components
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
    )  # fmt: skip
    return CogVideoXImageToVideoPipeline(**{**parts, "transformer": transformer.eval()})


def tiny_latte(*, seed=0):
    """Latte: embeddings cut to the prompt's length, in a batch of one only; a learned variance."""
    torch.manual_seed(seed)
    tokenizer, t5 = tiny_t5()
    transformer = LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
    )  # fmt: skip
    return LattePipeline(
        tokenizer=tokenizer, text_encoder=t5, vae=tiny_vae(), transformer=transformer.eval(), scheduler=DDIMScheduler()
    )


def tiny_lumina2(*, seed=0):
    """Lumina 2: guidance that keeps the norm, negated."""
    torch.manual_seed(seed)
    tokenizer, encoder = language_model(Gemma2Model, Gemma2Config, hidden_size=16, head_dim=8)
    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=1.5, scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2), axes_lens=(512, 64, 64), cap_feat_dim=16,
    )  # fmt: skip
    return Lumina2Pipeline(
        tokenizer=tokenizer, text_encoder=encoder, transformer=transformer.eval(),
        vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


class StylePipeline(StableDiffusionPipeline):
    """Its text embeddings have a mean of their own, which stands without a row in another argument."""

    @torch.no_grad()
    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator=None, return_dict=True):
        embeddings, _ = self.encode_prompt(prompt, "cpu", 1, False)
        style = embeddings.mean((0, 1), keepdim=True)[0]
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            output = self.unet(latents, t, encoder_hidden_states=embeddings, timestep_cond=style).sample
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return (latents,)
        images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (self.image_processor.postprocess(images, output_type="pt"),)


class OneAtATime(StableDiffusionPipeline):
    """Guides in a batch of one only: it has two timesteps, whatever the number of rows."""

    @torch.no_grad()
    def __call__(self, prompt, *, num_inference_steps, guidance_scale, output_type, generator=None, return_dict=True):
        embeddings = torch.cat(self.encode_prompt(prompt, "cpu", 1, True)[::-1])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(len(prompt), 4, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            output = self.unet(torch.cat([latents, latents]), t.view(1).repeat(2), encoder_hidden_states=embeddings)
            negative, positive = output.sample.chunk(2)
            guided = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return (latents,)
        images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return (self.image_processor.postprocess(images, output_type="pt"),)


def recast(pipeline_class):
    """Another pipeline class with the parts of a tiny Stable Diffusion."""
    return pipeline_class(**dict(tiny_stable_diffusion().components), requires_safety_checker=False)


def tiny_one_at_a_time(*, seed=0):
    return recast(OneAtATime)


def tiny_style(*, seed=0):
    torch.manual_seed(seed)
    parts = dict(tiny_stable_diffusion(seed=seed).components)
    config = {name: value for name, value in parts["unet"].config.items() if name != "_use_default_values"}
    parts["unet"] = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32}).eval()
    return StylePipeline(**parts, requires_safety_checker=False)


class NeedsNegative(StableDiffusionPipeline):
    """Guides only from a negative prompt that is given."""

    @torch.no_grad()
    def __call__(self, prompt, *, negative_prompt=None, guidance_scale=1.0, **options):
        if guidance_scale > 1:
            negative_prompt[0].strip()
        return super().__call__(prompt, negative_prompt=negative_prompt, guidance_scale=guidance_scale, **options)


def tiny_needs_negative(*, seed=0):
    return recast(NeedsNegative)


def tiny_hunyuan_dit(*, seed=0):
    """Hunyuan DiT: two text encoders with masks of fixed length, a learned variance, times in floating point."""
    torch.manual_seed(seed)
    tokenizer_2, t5 = tiny_t5()
    tokenizer = character_tokenizer()
    words = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), **words)).eval()
    return HunyuanDiTPipeline(
        vae=tiny_vae(), tokenizer=tokenizer, text_encoder=bert,
        tokenizer_2=tokenizer_2, text_encoder_2=t5, scheduler=DDPMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, transformer=transformer.eval(),
    )  # fmt: skip
