"""A LoRA to begin from, against the stock pipeline with the same LoRA loaded by diffusers."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpo import LoraConfig, Policy, SamplerConfig
from ddpo.validation import FieldError
from tests.tiny import tiny_stable_diffusion

SAMPLER = SamplerConfig(num_steps=3, guidance_scale=1.0)
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LoRA of rank 2 that changes the network, as `ddpo` exports it."""
    folder = tmp_path_factory.mktemp("lora")
    policy = made(LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in policy.trainable().items():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    policy.save(folder)
    return folder


def made(adapter):
    return Policy(tiny_stable_diffusion(), sampler=SAMPLER, adapter=adapter)


def output(network):
    """Of the denoiser, on fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 16, 16), (1, 77, 32)))
    with torch.no_grad():
        return network(x, torch.tensor([300]), encoder_hidden_states=text).sample


def stock(place=None):
    pipeline = tiny_stable_diffusion()
    if place is not None:
        pipeline.load_lora_weights(str(place))
    return output(pipeline.unet)


def close(one, two):
    return torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("config", [{"rank": 2}, {"rank": 5}, {"rank": 4, "alpha": 12.0}])
def test_the_trained_adapter_begins_at_the_lora_whatever_its_own_rank_and_scale(folder, config):
    policy = made(LoraConfig(init=str(folder), **config))
    assert close(output(policy.denoiser.module), stock(folder))
    assert not close(stock(folder), stock())
    with policy.reference():
        assert close(output(policy.denoiser.module), stock()), "the KL is to the pretrained model"


def test_what_is_left_of_the_rank_can_be_trained(folder):
    policy = made(LoraConfig(rank=3, init=str(folder)))
    downs = [value for name, value in policy.trainable().items() if "lora_A" in name]
    assert all(bool(down[2].abs().sum() > 0) for down in downs), "else B would have no gradient there, and A none by B"


def test_stacked_on_a_lora_the_reference_is_the_two_together(folder):
    policy = made(LoraConfig(rank=2, init=str(folder), reference="start"))
    assert close(output(policy.denoiser.module), stock(folder))
    with policy.reference():
        assert close(output(policy.denoiser.module), stock(folder))
    assert all(not value.any() for name, value in policy.trainable().items() if "lora_B" in name)


def test_what_is_trained_on_top_is_exported_alone(folder, tmp_path):
    policy = made(LoraConfig(rank=2, init=str(folder), reference="start"))
    with torch.no_grad():
        for name, value in policy.trainable().items():
            if "lora_B" in name:
                value.fill_(0.1)
    policy.save(tmp_path)
    pipeline = tiny_stable_diffusion()
    pipeline.load_lora_weights(str(folder))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(str(tmp_path))
    assert close(output(policy.denoiser.module), output(pipeline.unet))


def test_a_kohya_file_is_read_with_its_alpha(folder, tmp_path):
    state = {}
    for key, value in load_file(folder / FILE).items():
        layer, _, letter = key.removesuffix(".weight").rpartition(".lora_")
        name = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        state[f"{name}.lora_{'down' if letter == 'A' else 'up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(1.0)  # half of the rank
    save_file(state, tmp_path / "kohya.safetensors")
    policy = made(LoraConfig(rank=2, init=str(tmp_path / "kohya.safetensors")))
    assert close(output(policy.denoiser.module), stock(tmp_path / "kohya.safetensors"))
    assert not close(output(policy.denoiser.module), stock(folder))


def test_what_does_not_fit_is_refused_with_the_key_to_change(folder, tmp_path):
    state = load_file(folder / FILE)
    text = {f"text_encoder.{key.removeprefix('unet.')}": value.clone() for key, value in state.items()}
    save_file({**state, **text}, tmp_path / FILE)
    (tmp_path / "text.txt").write_text("no weights")
    attention = ("to_q", "to_k", "to_v")
    refused = {
        "also changes text_encoder, which is not trained": {"init": str(tmp_path), "rank": 2},
        "adapter.rank must be at least 2": {"init": str(folder), "rank": 1},
        "adapter.target_modules must be a list that has the layers": {
            "init": str(folder), "rank": 2, "target_modules": attention
        },
        "adapter.init must be a LoRA in safetensors, but diffusers says": {"init": str(tmp_path / "text.txt")},
    }  # fmt: skip
    for message, keys in refused.items():
        with pytest.raises(FieldError, match=message):
            made(LoraConfig(**keys))
    with pytest.raises(FieldError, match=r"reference must be base without adapter\.init"):
        LoraConfig(reference="start")
