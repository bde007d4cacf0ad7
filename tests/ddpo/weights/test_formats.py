"""Other tools' LoRA files: read back by diffusers, or by a reader of the published names that is written here."""

import pytest
import torch
from safetensors.torch import save_file

from ddpo import LoraConfig, Policy, SamplerConfig
from ddpo.validation import UserError
from ddpo.weights.export import lora_state
from ddpo.weights.formats import by_layer, merge, renamed
from tests.ddpo.families import tiny_flux, tiny_sd3, tiny_sdxl
from tests.ddpo.more_families import tiny_pixart
from tests.ddpo.tools import SIZE
from tests.tiny import tiny_stable_diffusion

UNETS = {"sd": tiny_stable_diffusion, "sdxl": tiny_sdxl}
MMDITS = {"sd3": tiny_sd3, "flux": tiny_flux}
FAMILIES = {**UNETS, **MMDITS}
CONVOLUTIONS = ("to_q", "to_out.0", "conv1")


def tuned(build, *, targets=None):
    """A policy with weights unlike the pretrained ones at a scale of 1.5, and its LoRA by layers."""
    adapter = LoraConfig(rank=2, alpha=3.0, target_modules=targets)
    policy = Policy(
        build(), sampler=SamplerConfig(kind="ode", num_steps=2, guidance_scale=1.0, **SIZE), adapter=adapter
    )
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return policy, by_layer(lora_state(policy.denoiser.module, adapter, policy.trainable()))


def changes(policy):
    """What peft itself adds to each layer's weight."""
    modules = policy.denoiser.module.named_modules()
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in modules
        if hasattr(layer, "lora_A") and layer.lora_A
    }


def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "generator": noise}
    return torch.from_numpy(pipeline("a red circle", output_type="np", **options).images)


def own_picture(policy):
    """Of the trained network in the stock pipeline."""
    pipeline = policy.pipeline
    pipeline.scheduler = FAMILIES[policy.family]().scheduler
    return picture(pipeline)


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize("scheme", ["kohya", "comfyui"])
@pytest.mark.parametrize("targets", [None, CONVOLUTIONS], ids=["attention", "convolutions"])
def test_diffusers_draws_the_same_picture_from_the_file(family, scheme, targets, tmp_path):
    policy, layers = tuned(UNETS[family], targets=targets)
    policy.family = family
    save_file(renamed(policy.denoiser.module, layers, scheme), tmp_path / "lora.safetensors")
    stock = UNETS[family]()
    before = picture(stock)
    stock.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert (picture(stock) - before).abs().max() > 1e-3
    torch.testing.assert_close(picture(stock), own_picture(policy), atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", MMDITS)
def test_comfyuis_file_of_an_mmdit_is_read_by_diffusers_and_draws_the_same_picture(family, tmp_path):
    policy, layers = tuned(MMDITS[family])
    policy.family = family
    save_file(renamed(policy.denoiser.module, layers, "comfyui"), tmp_path / "lora.safetensors")
    stock = MMDITS[family]()
    stock.load_lora_weights(str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(picture(stock), own_picture(policy), atol=2e-5, rtol=0)


# The original networks' fused layers, as the model definitions of FLUX.1 and SD 3 name them and split their outputs.
ORIGINAL = {
    "flux": {
        "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks_0_txt_attn_qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks_0_txt_attn_proj": ["transformer_blocks.0.attn.to_add_out"],
        "single_blocks_0_linear1": [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp"
        ],
    },
    "sd3": {
        key: value
        for i in (0, 1)
        for key, value in {
            f"joint_blocks_{i}_x_block_attn_qkv": [f"transformer_blocks.{i}.attn.to_{x}" for x in "qkv"],
            f"joint_blocks_{i}_context_block_attn_qkv": [f"transformer_blocks.{i}.attn.add_{x}_proj" for x in "qkv"],
            f"joint_blocks_{i}_x_block_attn_proj": [f"transformer_blocks.{i}.attn.to_out.0"],
            f"joint_blocks_{i}_context_block_attn_proj": [f"transformer_blocks.{i}.attn.to_add_out"],
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("family", MMDITS)
def test_a_reader_of_the_original_names_finds_the_change_of_every_weight(family):
    policy, layers = tuned(MMDITS[family])
    expected, stock = changes(policy), MMDITS[family]().transformer
    state = renamed(policy.denoiser.module, layers, "kohya")
    read = {}
    for name in {key.partition(".")[0] for key in state}:
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        change = up @ down * (state[f"{name}.alpha"] / down.shape[0])
        parts = ORIGINAL[family][name.removeprefix("lora_unet_")]
        sizes = [stock.get_submodule(part).weight.shape[0] for part in parts]
        read |= dict(zip(parts, change.split(sizes), strict=True))
    for name, change in expected.items():
        torch.testing.assert_close(read.pop(name), change, atol=1e-6, rtol=0)
    assert not any(change.any() for change in read.values())


def test_diffusers_reads_kohyas_names_of_flux():
    policy, layers = tuned(tiny_flux, targets=("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.2"))
    state = renamed(policy.denoiser.module, layers, "kohya")
    converted = type(policy.pipeline).lora_state_dict(dict(state))
    converted = converted[0] if isinstance(converted, tuple) else converted
    for name, change in changes(policy).items():
        down, up = (converted[f"transformer.{name}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(up @ down, change, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_network_draws_the_same_picture(family):
    policy, layers = tuned(FAMILIES[family])
    policy.family = family
    stock = FAMILIES[family]()
    merge(getattr(stock, policy.name), layers)
    torch.testing.assert_close(picture(stock), own_picture(policy), atol=2e-5, rtol=0)


def test_a_network_or_layer_without_such_names_is_refused():
    policy, layers = tuned(tiny_pixart)
    with pytest.raises(UserError, match="kohya has no names for PixArtTransformer2DModel"):
        renamed(policy.denoiser.module, layers, "kohya")
    policy, layers = tuned(tiny_flux, targets=("x_embedder",))
    with pytest.raises(UserError, match="no name for the layer x_embedder; take diffusers"):
        renamed(policy.denoiser.module, layers, "kohya")
