"""A LoRA under the names of other tools, and as a change of the weights themselves.

A layer's update is B @ A, its scale already in B (`ddpo.weights.export.lora_state`): alpha is the rank in every file.

    UNets      lora_unet_<path>, dots as underscores      kohya's scripts, A1111, Forge, ComfyUI, diffusers
    MMDiTs     lora_unet_<name in the original network>   kohya's scripts, ComfyUI; of FLUX.1 also diffusers
               transformer.<path>                         ComfyUI, which reads diffusers' own names there

Where the original network has one matrix for several of diffusers' (q, k and v), the As are stacked and the Bs are
the blocks of a block-diagonal matrix, so that the product is the same; what was not trained is a block of zeros.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ddpo.validation import UserError

Scheme = Literal["kohya", "comfyui"]
Part = tuple[str, Sequence[str]]  # the original layer, and the layers of diffusers whose outputs it has, in order

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX: dict[str, Part] = {
    **{f"transformer_blocks.*.attn.{name}": ("double_blocks_*_img_attn_qkv", _QKV) for name in _QKV},
    **{f"transformer_blocks.*.attn.{name}": ("double_blocks_*_txt_attn_qkv", _ADDED) for name in _ADDED},
    "transformer_blocks.*.attn.to_out.0": ("double_blocks_*_img_attn_proj", ()),
    "transformer_blocks.*.attn.to_add_out": ("double_blocks_*_txt_attn_proj", ()),
    "transformer_blocks.*.ff.net.0.proj": ("double_blocks_*_img_mlp_0", ()),
    "transformer_blocks.*.ff.net.2": ("double_blocks_*_img_mlp_2", ()),
    "transformer_blocks.*.ff_context.net.0.proj": ("double_blocks_*_txt_mlp_0", ()),
    "transformer_blocks.*.ff_context.net.2": ("double_blocks_*_txt_mlp_2", ()),
    "transformer_blocks.*.norm1.linear": ("double_blocks_*_img_mod_lin", ()),
    "transformer_blocks.*.norm1_context.linear": ("double_blocks_*_txt_mod_lin", ()),
    **{
        f"single_transformer_blocks.*.{name}": (
            "single_blocks_*_linear1",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        )
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    },
    "single_transformer_blocks.*.proj_out": ("single_blocks_*_linear2", ()),
    "single_transformer_blocks.*.norm.linear": ("single_blocks_*_modulation_lin", ()),
}
_SD3: dict[str, Part] = {
    **{f"transformer_blocks.*.attn.{name}": ("joint_blocks_*_x_block_attn_qkv", _QKV) for name in _QKV},
    **{f"transformer_blocks.*.attn2.{name}": ("joint_blocks_*_x_block_attn2_qkv", _QKV) for name in _QKV},
    **{f"transformer_blocks.*.attn.{name}": ("joint_blocks_*_context_block_attn_qkv", _ADDED) for name in _ADDED},
    "transformer_blocks.*.attn.to_out.0": ("joint_blocks_*_x_block_attn_proj", ()),
    "transformer_blocks.*.attn2.to_out.0": ("joint_blocks_*_x_block_attn2_proj", ()),
    "transformer_blocks.*.attn.to_add_out": ("joint_blocks_*_context_block_attn_proj", ()),
    "transformer_blocks.*.ff.net.0.proj": ("joint_blocks_*_x_block_mlp_fc1", ()),
    "transformer_blocks.*.ff.net.2": ("joint_blocks_*_x_block_mlp_fc2", ()),
    "transformer_blocks.*.ff_context.net.0.proj": ("joint_blocks_*_context_block_mlp_fc1", ()),
    "transformer_blocks.*.ff_context.net.2": ("joint_blocks_*_context_block_mlp_fc2", ()),
}
_ORIGINAL = {"FluxTransformer2DModel": _FLUX, "SD3Transformer2DModel": _SD3}
_COMFYUI_READS = (*_ORIGINAL, "QwenImageTransformer2DModel", "ZImageTransformer2DModel")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """One layer's update B @ A.

    Attributes:
        down: A, (rank, in) of a linear layer, (rank, in, kernel, kernel) of a convolution.
        up: B with its scale, (out, rank) or (out, rank, 1, 1).
    """

    down: Tensor
    up: Tensor

    def product(self) -> Tensor:
        """The change of the layer's weight, in float32 and its shape."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.reshape(self.up.shape[0], *self.down.shape[1:])


def by_layer(state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The updates by the names of their layers, of a LoRA in peft's naming.

    Args:
        state: As `ddpo.weights.export.lora_state` returns it.
    """
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {name: LowRank(down=state[f"{name}.lora_A.weight"], up=state[f"{name}.lora_B.weight"]) for name in layers}


def renamed(network: nn.Module, layers: Mapping[str, LowRank], scheme: Scheme) -> dict[str, Tensor]:
    """A LoRA as one file's tensors, for other tools.

    Args:
        network: The network that it belongs to.
        layers: From `by_layer`.
        scheme: Whose names.

    Raises:
        UserError: There are no such names for this network, or for a layer of it.
    """
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        return _as_kohya({name.replace(".", "_"): layer for name, layer in layers.items()})
    if scheme == "comfyui" and kind in _COMFYUI_READS:
        return {
            f"transformer.{name}.lora_{letter}.weight": value
            for name, layer in layers.items()
            for letter, value in (("A", layer.down), ("B", layer.up))
        }
    if kind not in _ORIGINAL:
        known = ", ".join(("UNet2DConditionModel", *(_ORIGINAL if scheme == "kohya" else _COMFYUI_READS)))
        raise UserError(f"--format {scheme} has no names for {kind}, only for {known}; take diffusers, peft or merged")
    return _as_kohya(_fused(network, layers, _ORIGINAL[kind]))


def _as_kohya(layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state[f"lora_unet_{name}.lora_down.weight"] = layer.down
        state[f"lora_unet_{name}.lora_up.weight"] = layer.up
        state[f"lora_unet_{name}.alpha"] = torch.tensor(float(layer.down.shape[0]))
    return state


def _fused(network: nn.Module, layers: Mapping[str, LowRank], names: Mapping[str, Part]) -> dict[str, LowRank]:
    """The updates under the original network's names."""
    found: dict[str, LowRank] = {}
    for name, layer in layers.items():
        number = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        if number is None or pattern not in names:
            raise UserError(f"--format kohya has no name for the layer {name}; take diffusers, comfyui or merged")
        original, parts = names[pattern]
        original = original.replace("*", number[1])
        if not parts:
            found[original] = layer
        elif original not in found:
            block = name[: -len(next(part for part in parts if name.endswith(f".{part}")))]
            found[original] = _side_by_side(network, layers, [block + part for part in parts])
    return found


def _side_by_side(network: nn.Module, layers: Mapping[str, LowRank], names: Sequence[str]) -> LowRank:
    """One update for the outputs of several layers of the same input, one after the other."""
    own = ["base_layer.weight" if name in layers else "weight" for name in names]
    rows = [network.get_submodule(name).get_parameter(key).shape[0] for name, key in zip(names, own, strict=True)]
    trained = [layers.get(name) for name in names]
    ups = [torch.zeros(count, 0) if layer is None else layer.up for count, layer in zip(rows, trained, strict=True)]
    downs = [layer.down for layer in trained if layer is not None]
    return LowRank(down=torch.cat(downs), up=torch.block_diag(*ups))


@torch.no_grad()
def merge(network: nn.Module, layers: Mapping[str, LowRank]) -> None:
    """Adds the updates to the weights of a network without an adapter, in float32, rounded once to its own precision.

    Args:
        network: Changed in place.
        layers: From `by_layer`.
    """
    for name, layer in layers.items():
        weight = network.get_submodule(name).get_parameter("weight")
        weight.copy_(weight.float() + layer.product().to(weight.device))
