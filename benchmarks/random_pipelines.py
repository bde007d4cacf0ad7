"""Pipelines of published sizes with random weights, for measurements that need no download.

Stable Diffusion 1.5, SDXL base and Stable Diffusion 3.5 medium: denoiser and VAE have the sizes of
`trainers/planning/architectures.py`, so do the CLIP text encoders; T5 is left out of SD 3.5, which its pipeline allows.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.planning.architectures import SD35_MEDIUM, SDXL, STABLE_DIFFUSION, Architecture

CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
ALPHAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    tokens = [*CHARACTERS, *(letter + "</w>" for letter in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _text_config(sizes: dict[str, int | str]) -> CLIPTextConfig:
    tokenizer = _tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    return CLIPTextConfig(vocab_size=49408, pad_token_id=tokenizer.eos_token_id, **ends, **sizes)


def _vae(architecture: Architecture, **scaling: float) -> AutoencoderKL:
    assert architecture.vae is not None
    return AutoencoderKL(**architecture.vae, **scaling)


def _stable_diffusion(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**ALPHAS, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion(device: str) -> DiffusionPipeline:
    """Stable Diffusion 1.5: a UNet of 860 M parameters, 512 pixels."""
    with torch.device(device):
        vae, text_encoder = _vae(STABLE_DIFFUSION), CLIPTextModel(_text_config(CLIP_L))
        unet = UNet2DConditionModel(**STABLE_DIFFUSION.denoiser)
    return _stable_diffusion(vae, text_encoder, unet)


def stable_diffusion_xl(device: str) -> DiffusionPipeline:
    """SDXL base: a UNet of 2.6 B parameters, 1024 pixels."""
    with torch.device(device):
        vae, unet = _vae(SDXL, scaling_factor=0.13025), UNet2DConditionModel(**SDXL.denoiser)
        encoders = CLIPTextModel(_text_config(CLIP_L)), CLIPTextModelWithProjection(_text_config(BIG_G))
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**ALPHAS, timestep_spacing="leading"),
        add_watermarker=False,
    )


def stable_diffusion_35(device: str) -> DiffusionPipeline:
    """Stable Diffusion 3.5 medium without T5: a transformer of 2.2 B parameters, 1024 pixels."""
    with torch.device(device):
        transformer = SD3Transformer2DModel(in_channels=16, out_channels=16, **SD35_MEDIUM.denoiser)
        vae = _vae(SD35_MEDIUM, scaling_factor=1.5305, shift_factor=0.0609)
        encoders = [
            CLIPTextModelWithProjection(_text_config(sizes)) for sizes in ({**CLIP_L, "projection_dim": 768}, BIG_G)
        ]
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=None,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def small_stable_diffusion(channels: tuple[int, int]) -> DiffusionPipeline:
    """Stable Diffusion's classes for 32 pixels, latents of 16 x 16; (32, 64) channels are .99 M parameters."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
    )
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _stable_diffusion(vae, CLIPTextModel(_text_config(text)), unet)


BUILDERS: dict[str, Callable[[str], DiffusionPipeline]] = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd35": stable_diffusion_35,
}


def save_random_pipeline(name: str, folder: Path) -> None:
    """Writes a pipeline of `BUILDERS` in bfloat16; where there is a GPU, its weights are drawn there, in seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pipeline = BUILDERS[name](device)
    finally:
        torch.set_default_dtype(before)
    pipeline.to("cpu", torch.bfloat16).save_pretrained(folder)
