"""Tiny random pipelines of further model families: transformers, video, and without prompts."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.ddpo.families import tiny_t5, tiny_vae

# The user's text first: a token a character, the long texts of these pipelines would push it out of the sequence.
CHAT = (
    "{% for m in messages|reverse %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}\n"
    "{% endfor %}"
)
MATH = {"beta_start": 0.0001, "beta_end": 0.02}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


def character_tokenizer():
    """A token a character, with a chat template."""
    vocabulary = ["<pad>", "<unk>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=CHAT, padding_side="right"
    )


def language_model(model, config, **options):
    tokenizer = character_tokenizer()
    settings = config(vocab_size=len(tokenizer), pad_token_id=0, **{**SMALL, **options})
    return tokenizer, model(settings).eval()


def tiny_pixart(*, seed=0):
    """PixArt-Sigma: the second half of the output is a learned variance, and there are no LoRA loaders."""
    torch.manual_seed(seed)
    tokenizer, encoder = tiny_t5()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        scheduler=DDIMScheduler(**MATH, clip_sample=False),
    )


def tiny_sana(*, seed=0):
    torch.manual_seed(seed)
    tokenizer, encoder = language_model(Gemma2Model, Gemma2Config, hidden_size=16, head_dim=8)
    blocks = {"block_out_channels": (16, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()},
            scaling_factor=0.4,
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_flux2(*, seed=0):
    """FLUX.2: its prompt embeddings are the hidden states of layers 10, 20 and 30."""
    torch.manual_seed(seed)
    tokenizer, encoder = language_model(MistralModel, MistralConfig, hidden_size=8, num_hidden_layers=31, head_dim=4)
    return Flux2Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLFlux2(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
            latent_channels=4,
            sample_size=32,
        ),
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def tiny_qwen(*, seed=0):
    """Qwen-Image: embeddings as long as the longest prompt of the batch, guidance that preserves norms."""
    torch.manual_seed(seed)
    tokenizer, encoder = language_model(Qwen2Model, Qwen2Config, hidden_size=16)
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def tiny_z_image(*, seed=0):
    """Z-Image: lists of latents and embeddings, the conditional rows first, a negated velocity."""
    torch.manual_seed(seed)
    tokenizer, encoder = language_model(Qwen3Model, Qwen3Config, hidden_size=16, head_dim=8)
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[1024, 64, 64],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_wan(*, seed=0):
    """Wan 2.1 text-to-video: latents of five axes."""
    torch.manual_seed(seed)
    tokenizer, _ = tiny_t5()
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=32, d_ff=37, d_kv=8, num_heads=4, num_layers=2)
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def tiny_cogvideox(*, seed=0):
    """CogVideoX: a scheduler of its own, whose noise schedule has a shifted signal-to-noise ratio."""
    torch.manual_seed(seed)
    tokenizer, encoder = tiny_t5()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ).eval(),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=1,
            sample_width=2,
            sample_height=2,
            sample_frames=9,
        ).eval(),
        scheduler=CogVideoXDDIMScheduler(
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


def tiny_cogview4(*, seed=0):
    """CogView4: embeddings padded to a multiple of 16 tokens of the longest prompt, without a mask."""
    torch.manual_seed(seed)
    tokenizer, encoder = language_model(GlmModel, GlmConfig, hidden_size=16, head_dim=8)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_vae(),
        transformer=CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
            sample_size=16,
            pos_embed_max_size=32,
            rope_axes_dim=(64, 64),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type="linear"),
    )


def tiny_ddpm(*, seed=0):
    """DDPM: no prompts, in pixel space."""
    torch.manual_seed(seed)
    return DDPMPipeline(
        unet=UNet2DModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDPMScheduler(**MATH),
    )
