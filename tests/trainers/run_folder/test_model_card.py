"""The card beside exported weights: the hub can read it, and what it says to type loads them."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig
from rewards import RewardTerm
from tests.ddpo.more_families import tiny_ddpm
from tests.tiny import tiny_stable_diffusion
from trainers.config import Config
from trainers.config.groups import ModelConfig
from trainers.run_folder.model_card import write_model_card


def described(pipeline, base: Path, folder: Path, adapter) -> tuple[Policy, str]:
    """Policy of a pipeline with weights unlike the pretrained ones, and the card beside their export."""
    pipeline.save_pretrained(base)
    policy = Policy.from_pretrained(base, sampler=SamplerConfig(num_steps=2, guidance_scale=1.0), adapter=adapter)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    policy.save(folder)
    (base / "README.md").write_text("---\nlicense: openrail\n---\nA model.\n")
    config = Config(
        model=ModelConfig(path=str(base)),
        sampler=SamplerConfig(num_steps=2, guidance_scale=1.0, eta=0.5, height=32, width=32),
        rewards=(RewardTerm(name="brightness", weight=2.0),),
    )
    return policy, write_model_card(folder, policy, config, epoch=7, samples=1792).read_text()


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (tiny_stable_diffusion, LoraConfig(rank=2)),
        (tiny_stable_diffusion, FullConfig()),
        (tiny_ddpm, LoraConfig(rank=2)),
    ],
    ids=["lora", "all weights", "lora by peft"],
)
def test_the_code_on_the_card_loads_what_was_trained(make, adapter, tmp_path):
    folder = tmp_path / "weights"
    policy, card = described(make(), tmp_path / "base", folder, adapter)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    script = tmp_path / "card.py"
    script.write_text(code.replace("FOLDER", str(folder)))
    found = runpy.run_path(str(script))
    if make is tiny_stable_diffusion:
        assert found["picture"].size == (32, 32)
        assert "num_inference_steps=2, guidance_scale=1.0, eta=0.5, height=32, width=32" in code
    network = getattr(found["pipe"], policy.name)
    x, time = torch.randn(1, *policy.latent_shape), torch.tensor(3)
    inputs = {"encoder_hidden_states": torch.randn(1, 5, 32)} if make is tiny_stable_diffusion else {}
    with torch.no_grad():
        ours = policy.denoiser.module(x, time, **inputs).sample
        assert torch.allclose(network(x, time, **inputs).sample, ours, atol=1e-5)
        with policy.reference():
            pretrained = policy.denoiser.module(x, time, **inputs).sample
    assert adapter == FullConfig() or not torch.allclose(pretrained, ours, atol=1e-2)


def test_the_hub_reads_the_card_and_people_what_was_done(tmp_path):
    _, text = described(tiny_stable_diffusion(), tmp_path / "base", tmp_path / "weights", LoraConfig(rank=2))
    data = ModelCard(text).data
    assert data.library_name == "diffusers" and "lora" in data.tags and data.base_model is None
    assert data.license == "openrail"
    assert "The licence is that of the pretrained model (openrail)." in text
    assert "2 x `brightness`" in text and "7 epochs, 1,792 images" in text


def test_a_model_of_the_hub_is_named_as_the_base(tmp_path):
    policy, _ = described(tiny_stable_diffusion(), tmp_path / "base", tmp_path / "weights", LoraConfig(rank=2))
    config = Config(model=ModelConfig(path="owner/name"))
    path = write_model_card(tmp_path, policy, config, epoch=1, samples=8, results="reward  1  2", picture="a.png")
    card = ModelCard.load(path)
    assert card.data.base_model == "owner/name"
    assert "reward  1  2" in card.text and "![pretrained and fine-tuned](a.png)" in card.text
