"""The parts of the tiny latent diffusion model of shapes, and the `StableDiffusionPipeline` they make.

Everything is a stock class of diffusers or transformers with a small configuration: 32 x 32 pixels, (4, 8, 8) latents,
captions of at most 12 tokens. Shapes: `N` captions, `L` = `MAX_TOKENS`.
"""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rewards.builtin.shapes.render import SIZE
from rewards.builtin.shapes.scene import VOCABULARY

MAX_TOKENS = 12
_TEXT_WIDTH = 64
_PAD, _BOS, _EOS = "<|pad|>", "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Builds a word-level CLIP tokenizer: every word of the grammar is one token.

    The byte-pair merges of a word add one letter at a time, from the left: r e, re d</w>. Longer words come first, else
    a merge of "red" would break "three". Letters remain as a fallback, so that any lower-case text can be tokenized.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [_PAD, _BOS, _EOS, *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in sorted(VOCABULARY, key=len, reverse=True):
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for size in range(1, len(symbols)):
            merges.append(("".join(symbols[:size]), symbols[size]))
            pieces.append("".join(symbols[: size + 1]))
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(dict.fromkeys(merges)),
        model_max_length=MAX_TOKENS,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token=_EOS,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns the (N, L) int64 token ids of captions, padded to L = `MAX_TOKENS`."""
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def make_vae() -> AutoencoderKL:
    """Builds the autoencoder, (3, 32, 32) pixels to (4, 8, 8) latents; 0.23 M parameters.

    Its posterior starts almost free of noise, which saves the first minute of training.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
    )
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -4.0)
    return vae.to(memory_format=torch.channels_last)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds a two-layer text encoder for the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_unet(widths: tuple[int, int] = (40, 80)) -> UNet2DConditionModel:
    """Builds the denoiser on (4, 8, 8) latents, with attention to the caption at both resolutions.

    `attention_head_dim` is the number of heads here, a misnomer of diffusers that its configurations keep.
    """
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=_TEXT_WIDTH,
    )
    return unet.to(memory_format=torch.channels_last)


def make_scheduler() -> DDIMScheduler:
    """Builds the noise schedule of Stable Diffusion with velocity prediction.

    `set_alpha_to_one` makes the last step return the network's clean estimate, without the noise of std 0.03 that
    Stable Diffusion leaves in its pictures; `sampler.last_step: noisy` gives every step a density by ending with it.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(
    *, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Joins the parts to a stock pipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes a float16 copy of a pipeline as a folder of safetensors, to be loaded with `torch_dtype=torch.float32`."""
    halves = {name: copy.deepcopy(getattr(pipeline, name)).half() for name in ("vae", "text_encoder", "unet")}
    assemble(tokenizer=pipeline.tokenizer, **halves).save_pretrained(folder)


def load(folder: Path) -> StableDiffusionPipeline:
    """Loads an exported pipeline in float32."""
    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
