"""Builds the tiny random pipelines of the comparison: `python pipelines.py FOLDER`.

Both commits load the same files, so the recipes need nothing of the project: the classes of diffusers and transformers,
their weights drawn from a fixed seed. An image has 24 x 24 pixels and 576 latent dimensions: a division by a power of
two is exact, and would hide a change in the order of operations.

    FOLDER/vp      Stable Diffusion 1.x: noise prediction, guidance in one call of two halves
    FOLDER/flow    Stable Diffusion 3: flow matching, three text encoders
"""

import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz "
WIDTH = 32


def tokenizer() -> CLIPTokenizer:
    """One token a letter."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


def text_config() -> CLIPTextConfig:
    """Two layers."""
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        max_position_embeddings=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.eos_token_id,
    )


def autoencoder(**options: object) -> AutoencoderKL:
    """Halves the size once: 12 x 12 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=8,
        sample_size=24,
        latent_channels=4,
        **options,
    )


def vp() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x."""
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=12,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def t5_tokenizer() -> T5Tokenizer:
    """One token a letter."""
    letters = [(letter, -1.0) for letter in LETTERS.replace(" ", "▁")]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


def flow() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3."""
    t5 = T5Config(vocab_size=len(t5_tokenizer()), d_model=2 * WIDTH, d_ff=WIDTH, d_kv=8, num_heads=4, num_layers=1)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=12,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=WIDTH,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
        ),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config()),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def main() -> None:
    """Builds and saves them."""
    folder = Path(sys.argv[1])
    for build in (vp, flow):
        torch.manual_seed(0)
        build().save_pretrained(folder / build.__name__, safe_serialization=True)


if __name__ == "__main__":
    main()
