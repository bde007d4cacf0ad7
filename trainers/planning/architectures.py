"""Published architectures of well-known pipelines, so that a run on them can be planned without a download.

The numbers are those of the `config.json` files in the repositories of the same names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CLIP_L = 123_060_480
CLIP_L_PROJECTED = 123_650_304
CLIP_BIG_G = 694_659_840
T5_XXL = 4_762_310_656
INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of a pipeline's networks.

    Attributes:
        denoiser_class: Class in diffusers.
        denoiser: Its configuration; what is missing is the class's default.
        vae: Configuration of its AutoencoderKL; None for a pipeline in pixel space.
        encoder_parameters: Of all text encoders.
    """

    denoiser_class: str
    denoiser: Mapping[str, object]
    vae: Mapping[str, object] | None
    encoder_parameters: int


def _vae(latent_channels: int, *, quant_conv: bool) -> dict[str, object]:
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": latent_channels,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
        "force_upcast": True,
    }


STABLE_DIFFUSION = Architecture(
    denoiser_class="UNet2DConditionModel",
    denoiser={"sample_size": 64, "cross_attention_dim": 768},
    vae=_vae(4, quant_conv=True),
    encoder_parameters=CLIP_L,
)
SDXL = Architecture(
    denoiser_class="UNet2DConditionModel",
    denoiser={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=_vae(4, quant_conv=True),
    encoder_parameters=CLIP_L + CLIP_BIG_G,
)
SD35_MEDIUM = Architecture(
    denoiser_class="SD3Transformer2DModel",
    denoiser={
        "sample_size": 128,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
    vae=_vae(16, quant_conv=False),
    encoder_parameters=CLIP_L_PROJECTED + CLIP_BIG_G + T5_XXL,
)
FLUX = Architecture(
    denoiser_class="FluxTransformer2DModel",
    denoiser={"guidance_embeds": True},
    vae=_vae(16, quant_conv=False),
    encoder_parameters=CLIP_L + T5_XXL,
)

ARCHITECTURES: dict[str, Architecture] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": STABLE_DIFFUSION,
    "CompVis/stable-diffusion-v1-4": STABLE_DIFFUSION,
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stabilityai/stable-diffusion-3.5-medium": SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": FLUX,
}
STACKS_GUIDANCE = {  # whether guidance doubles the rows of a call; else it is an input of distilled weights
    "UNet2DConditionModel": True,
    "SD3Transformer2DModel": True,
    "FluxTransformer2DModel": False,
}


def stacks_guidance(path: str) -> bool | None:
    """Whether guidance doubles a pipeline's denoiser rows; None where that shows only once it is loaded.

    Args:
        path: `model.path`.
    """
    if path == "shapes":
        return True
    folder = Path(path).expanduser()
    if (folder / INDEX).is_file():
        return STACKS_GUIDANCE.get(denoiser_of(read_classes(folder))[1])
    return STACKS_GUIDANCE[ARCHITECTURES[path].denoiser_class] if path in ARCHITECTURES else None


def read_classes(folder: Path) -> dict[str, str]:
    """The class of each part of a pipeline folder, by the part's name; nothing if its index cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return {}
    entries = index.items() if isinstance(index, dict) else ()
    pairs = {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 2}
    return {name: entry[1] for name, entry in pairs.items() if isinstance(entry[1], str)}


def denoiser_of(classes: Mapping[str, str]) -> tuple[str, str]:
    """Name and class of the part that denoises; empty if there is none."""
    name = next((name for name in ("unet", "transformer") if name in classes), "")
    return name, classes.get(name, "")
