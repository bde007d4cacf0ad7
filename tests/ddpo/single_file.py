"""Writes Stable Diffusion's weights as one file, by the names of CompVis' latent diffusion, where it was published."""

import re
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """One file with the weights of the U-Net, the VAE and the text encoder."""
    parts = (
        ("model.diffusion_model.", pipeline.unet, lambda name: _unet(name, pipeline.unet.config)),
        ("first_stage_model.", pipeline.vae, lambda name: _vae(name, len(pipeline.vae.config.block_out_channels))),
        ("cond_stage_model.transformer.text_model.", pipeline.text_encoder, str),
    )
    tensors = {}
    for prefix, network, rename in parts:
        for name, tensor in network.state_dict().items():
            own = rename(name)
            is_convolution = ".attn_1." in own and not own.endswith(("norm.weight", "bias"))
            tensors[prefix + own] = (tensor[..., None, None] if is_convolution else tensor).contiguous().clone()
    save_file(tensors, file)


def _unet(name: str, config: object) -> str:
    each = config.layers_per_block + 1
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if "resnets" in name:
        name = _replaced(name, _RESNET)
    if found := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", name):
        block, kind, layer = int(found[1]), found[2], int(found[3])
        return f"input_blocks.{1 + block * each + layer}.{int(kind == 'attentions')}.{name[found.end() :]}"
    if found := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.", name):
        return f"input_blocks.{(int(found[1]) + 1) * each}.0.op.{name[found.end() :]}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{name[found.end() :]}"
    if found := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", name):
        block, kind, layer = int(found[1]), found[2], int(found[3])
        return f"output_blocks.{block * each + layer}.{int(kind == 'attentions')}.{name[found.end() :]}"
    found = re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.", name)
    place = 2 if "CrossAttn" in config.up_block_types[int(found[1])] else 1
    return f"output_blocks.{int(found[1]) * each + each - 1}.{place}.{name[found.end() :]}"


def _vae(name: str, blocks: int) -> str:
    if "attentions.0" in name:
        name = _replaced(name, _ATTENTION)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("down_blocks.", "down.")
    name = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", name)
    return name.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut").replace("conv_norm", "norm")


def _replaced(name: str, names: dict[str, str]) -> str:
    parts = {f".{ours}.": f".{theirs}." for ours, theirs in names.items() if f".{ours}." in name}
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name
