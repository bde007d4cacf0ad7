"""Denoisers and VAEs, shrunken: their own default configurations with a small number for every known parameter.

`SMALL` is the rule, by the names of constructor parameters; `DENOISERS` and `VAES` are what a class needs besides.
"""

import inspect

import diffusers
import torch
from torch import nn

from tests.pipelines.encoders import HIDDEN

LATENT_CHANNELS = 4
PACKED_CHANNELS = 4 * LATENT_CHANNELS  # two by two latents as one token
HEADS = {"num_attention_heads": 2, "attention_head_dim": HIDDEN // 2}
WIDTHS = (
    "caption_channels", "text_dim", "text_embed_dim", "joint_attention_dim", "cross_attention_dim",
    "pooled_projection_dim", "context_in_dim", "cap_feat_dim", "text_in_dim", "in_text_dim", "in_text_dim2",
    "caption_projection_dim", "hidden_size", "cross_attention_dim_t5", "text_encoder_dim", "dim", "text_hidden_dim",
    "encoder_hidden_states_channels", "crossattn_proj_in_channels",
)  # fmt: skip
SMALL: dict[str, object] = {
    **HEADS, **dict.fromkeys(WIDTHS, HIDDEN), "num_layers": 2, "num_single_layers": 1, "num_refiner_layers": 1,
    "num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_kv_heads": 2, "num_key_value_heads": 2, "depth": 2,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": HIDDEN // 2, "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS, "axes_dims_rope": (4, 4, 8), "rope_axes_dim": (4, 4, 8), "sample_size": 16,
    "time_embed_dim": HIDDEN, "condition_dim": 8, "ffn_dim": 32, "freq_dim": 16, "intermediate_size": 32,
    "ffn_hidden_size": 32, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    "rope_max_seq_len": 32, "timestep_guidance_channels": 16, "pos_embed_max_size": 32,
}  # fmt: skip
PACKED = {"in_channels": PACKED_CHANNELS, "out_channels": None}
NORMED = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
          "attention_bias": True, "activation_fn": "gelu-approximate"}  # fmt: skip
LEARNED_VARIANCE = {"out_channels": 2 * LATENT_CHANNELS}
# (in_channels of the class, if not the latents', and whatever else its defaults make large or leave open)
DENOISERS: dict[str, dict[str, object]] = {
    "UNet2DConditionModel": {
        "num_attention_heads": None,
        "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "UNet3DConditionModel": {
        "num_attention_heads": None,
        "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNet2DModel": {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 8, "in_channels": 3, "out_channels": 3,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "Kandinsky3UNet": {
        "time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4, "layers_per_block": 3,
        "block_out_channels": (32, 64), "cross_attention_dim": 4, "encoder_hid_dim": HIDDEN,
    },
    "FluxTransformer2DModel": {**PACKED, "patch_size": 1, "guidance_embeds": True},
    "Flux2Transformer2DModel": {**PACKED, "patch_size": 1, "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 24},
    "ChromaTransformer2DModel": PACKED,
    "BriaTransformer2DModel": {**PACKED, "pooled_projection_dim": None},
    "BriaFiboTransformer2DModel": {**PACKED, "in_channels": LATENT_CHANNELS, "text_encoder_dim": HIDDEN,
                                   "joint_attention_dim": 2 * HIDDEN},
    "OvisImageTransformer2DModel": {**PACKED, "out_channels": PACKED_CHANNELS},
    "LongCatImageTransformer2DModel": {**PACKED, "axes_dims_rope": [4, 4, 8]},
    "QwenImageTransformer2DModel": {"in_channels": PACKED_CHANNELS},
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": PACKED_CHANNELS, "num_experts": 2, "moe_intermediate_dim": 16, "num_layers": 4,
        "num_key_value_heads": 1,
    },
    "SD3Transformer2DModel": {"patch_size": 1, "pooled_projection_dim": 2 * HIDDEN, "caption_projection_dim": HIDDEN},
    "PixArtTransformer2DModel": {**NORMED, **LEARNED_VARIANCE, "use_additional_conditions": False, "sample_size": 8},
    "LatteTransformer3DModel": {**NORMED, **LEARNED_VARIANCE, "sample_size": 8, "patch_size": 2},
    "AllegroTransformer3DModel": {"sample_height": 8, "sample_width": 8, "sample_frames": 2,
                                  "attention_head_dim": 24, "cross_attention_dim": 48},
    "HunyuanDiT2DModel": {**LEARNED_VARIANCE, "patch_size": 2, "pooled_projection_dim": 16, "learn_sigma": True,
                          "activation_fn": "gelu-approximate"},
    "HunyuanVideoTransformer3DModel": {"patch_size": 1, "guidance_embeds": True},
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 2 * LATENT_CHANNELS + 1, "text_embed_2_dim": HIDDEN, "image_embed_dim": HIDDEN,
        "target_size": 16,
    },
    "HunyuanImageTransformer2DModel": {"rope_axes_dim": (8, 8), "text_embed_2_dim": HIDDEN},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "text_emb_dim": 2 * HIDDEN, "caption_channels": [HIDDEN, HIDDEN], "llama_layers": [0, 1],
        "axes_dims_rope": (4, 4, 8), "max_resolution": (32, 32), "num_routed_experts": 2,
    },
    "CogVideoXTransformer3DModel": {"sample_width": 2, "sample_height": 2, "sample_frames": 9},
    "ConsisIDTransformer3DModel": {"sample_width": 2, "sample_height": 2, "sample_frames": 9},
    "CogView3PlusTransformer2DModel": {"condition_dim": 2},
    "CogView4Transformer2DModel": {"rope_axes_dim": (64, 64)},
    "CosmosTransformer3DModel": {"in_channels": LATENT_CHANNELS, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
                                 "mlp_ratio": 2.0},
    "EasyAnimateTransformer3DModel": {"patch_size": 2, "mmdit_layers": 2, "sample_width": 8, "sample_height": 8,
                                      "text_embed_dim_t5": None},
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": LATENT_CHANNELS, "out_visual_dim": LATENT_CHANNELS, "time_dim": 16, "model_dim": HIDDEN,
        "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 8),
    },
    "Krea2Transformer2DModel": {
        "in_channels": PACKED_CHANNELS, "timestep_embed_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
    },
    "LTXVideoTransformer3DModel": {},
    "Lumina2Transformer2DModel": {
        "sample_size": 4, "hidden_size": 24, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
        "ffn_dim_multiplier": 1.5, "axes_dim_rope": (4, 2, 2), "axes_lens": (512, 64, 64),
    },
    "LuminaNextDiT2DModel": {"multiple_of": 16, "num_kv_heads": 2},
    "MochiTransformer3DModel": {"in_channels": 12, "out_channels": None, "pooled_projection_dim": 16,
                                "time_embed_dim": 4},
    "PRXTransformer2DModel": {"num_heads": 2, "axes_dim": [8, 8]},
    "SanaVideoTransformer3DModel": {"sample_size": 8},
    "SanaTransformer2DModel": {"sample_size": 8, "guidance_embeds": False},
    "MotifVideoTransformer3DModel": {"in_channels": 2 * LATENT_CHANNELS + 1, "patch_size": 1},
    "OmniGenTransformer2DModel": {"vocab_size": 200, "pad_token_id": 0, "time_step_dim": 16},
    "ErnieImageTransformer2DModel": {"in_channels": PACKED_CHANNELS, "out_channels": PACKED_CHANNELS},
    "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
                                 "axes_dims": [4, 4, 8], "axes_lens": [1024, 64, 64]},
    "DiTTransformer2DModel": {**LEARNED_VARIANCE, "sample_size": 8, "num_embeds_ada_norm": 10},
    "AuraFlowTransformer2DModel": {"caption_projection_dim": HIDDEN, "pos_embed_max_size": 256},
}  # fmt: skip

BLOCKS_2D = {
    "block_out_channels": (16, 16), "norm_num_groups": 8, "sample_size": 32, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
UNSCALED = {"latents_mean": [0.0] * LATENT_CHANNELS, "latents_std": [1.0] * LATENT_CHANNELS}
WAN = {"base_dim": 8, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 2], "num_res_blocks": 1, **UNSCALED}
DC = {"block_out_channels": (16, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
HUNYUAN = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
VAES: dict[str, dict[str, object]] = {
    "AutoencoderKL": {**BLOCKS_2D, "shift_factor": 0.06, "scaling_factor": 1.5},
    "AutoencoderKLFlux2": BLOCKS_2D,
    "AutoencoderKLWan": {**WAN, "temperal_downsample": [True], "scale_factor_temporal": 2, "scale_factor_spatial": 2},
    "AutoencoderKLQwenImage": {**WAN, "temperal_downsample": [False]},
    "AutoencoderKLCogVideoX": {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4, **HUNYUAN,
    },
    "AutoencoderDC": {
        "attention_head_dim": 8, "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
        "scaling_factor": 0.4,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in DC.items()},
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 16,
        "force_upcast": False,
    },
    "AutoencoderKLHunyuanVideo": HUNYUAN,
    "AutoencoderKLHunyuanVideo15": {"block_out_channels": (16, 16, 16, 16, 16), "layers_per_block": 1},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "layers_per_block": 1,
        "spatial_compression_ratio": 2, "sample_size": 16, "scaling_factor": 0.75,
    },
    "AutoencoderKLLTXVideo": {
        "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5, "patch_size": 1, "patch_size_t": 1, "encoder_causal": True,
    },
    "AutoencoderKLMochi": {
        "latent_channels": 12, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLMagvit": {
        "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 2, "layers_per_block": 1, "spatial_group_norm": False,
        "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
        "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
    },
    "VQModel": {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "norm_num_groups": 8, "norm_type": "spatial",
        "num_vq_embeddings": 12, "vq_embed_dim": 4, "layers_per_block": 1,
    },
}  # fmt: skip


def build(name: str, more: dict[str, object], *, is_vae: bool = False) -> nn.Module:
    """A network of a class, as small as the tables say.

    Args:
        name: Its class in diffusers.
        more: What the pipeline needs of it besides.
        is_vae: Whether it makes pictures of latents.
    """
    network = getattr(diffusers, name)
    parameters = inspect.signature(network.__init__).parameters
    rule = {"latent_channels": LATENT_CHANNELS} if is_vae else SMALL
    small = {key: value for key, value in rule.items() if key in parameters}
    wanted = {**small, **(VAES if is_vae else DENOISERS).get(name, {}), **more}
    if "out_channels" not in parameters:
        wanted.pop("out_channels", None)
    made: nn.Module = network(**wanted)
    return (made if is_vae else shaken(made)).eval()


@torch.no_grad()
def shaken(network: nn.Module) -> nn.Module:
    """A network with noise for its zeros: some start so, and then no output depends on anything."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=0.02)
    return network
