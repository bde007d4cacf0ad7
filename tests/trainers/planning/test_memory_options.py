"""Options that save memory: the numbers stay what they were, and a run resumes bit-exactly."""

import importlib.util

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ddpo import LoraConfig, Policy, SamplerConfig, rollout, sample_seeds
from ddpo.loading import load_pipeline
from ddpo.pipeline.denoiser import padded_pieces
from ddpo.weights.adapter import FullConfig
from tests.ddpo.families import tiny_flux, tiny_sd3, tiny_sdxl
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import reproducible, weights, write_config
from trainers.config import Config
from trainers.config.errors import ConfigError
from trainers.config.groups import ModelConfig, OptimizerConfig
from trainers.config.io import load_config, to_yaml
from trainers.loop import resume, train_from_config
from trainers.planning.preflight import check_optimizer

PROMPTS = ["a cat", "a dog", "a bird"]
has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
has_torchao = importlib.util.find_spec("torchao") is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


def run(folder, model, *overrides, epochs=2):
    folder.mkdir(exist_ok=True)
    shorter = ("--epochs", str(epochs), "--evaluation.num_prompts", "1", "--evaluation.ode", "false")
    config = load_config(write_config(folder, model, guidance=3.0), [*shorter, *overrides])
    return train_from_config(config, config_yaml=to_yaml(config, full=True))


def sampled(policy):
    return rollout(policy, policy.encode(PROMPTS), sample_seeds(0, 0, range(3)))


@pytest.mark.skipif(not has_bitsandbytes, reason="needs bitsandbytes")
def test_8_bit_adam_resumes_bit_exactly(model, tmp_path):
    rank = ("--adapter.rank", "64", "--optimizer.eight_bit", "true", "--run.name", "run")
    whole = run(tmp_path / "whole", model, *rank)
    part = run(tmp_path / "part", model, *rank, epochs=1)
    resume(part, ["--epochs", "2"])
    expected, obtained = weights(whole, "weights", "optimizer", "ema"), weights(part, "weights", "optimizer", "ema")
    assert any(value.dtype == torch.uint8 for value in expected.values()), "some averages are in 8 bits"
    assert expected.keys() == obtained.keys()
    assert all(torch.equal(expected[name], obtained[name]) for name in expected)
    assert reproducible(whole) == reproducible(part)


def test_8_bit_adam_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes: pip install 'ddpo\[bitsandbytes\]'"):
        check_optimizer(Config(optimizer=OptimizerConfig(eight_bit=True)))


@pytest.mark.skipif(not has_torchao, reason="needs torchao")
@pytest.mark.parametrize("quantization", ["torchao_int8", "torchao_float8"])
def test_a_quantised_base_trains_and_exports(model, tmp_path, quantization):
    def load(kind):
        return Policy.from_pretrained(
            model, sampler=SamplerConfig(num_steps=3), adapter=LoraConfig(rank=2), quantization=kind, device="cpu"
        )

    policy, plain = load(quantization), load(None)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = sampled(policy)
    assert not torch.equal(path.latents, sampled(plain).latents), "the weights were rounded"
    distribution = policy(1, path.latents[:, 1], path.condition)
    log_prob = distribution.log_prob(path.latents[:, 2])
    assert torch.equal(log_prob, path.log_probs[:, 1]), "the first ratio is 1"
    log_prob.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.trainable().values())
    policy.save(tmp_path)
    fresh = load_pipeline(model, dtype=torch.float32, quantization=quantization)
    fresh.load_lora_weights(str(tmp_path))
    arguments = (torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.randn(1, 77, 32))
    with torch.no_grad():
        assert torch.equal(fresh.unet(*arguments).sample, policy.denoiser.module(*arguments).sample)


def test_quantised_weights_cannot_be_trained_fully():
    with pytest.raises(ValueError, match="model.quantization must be null with adapter.kind: full"):
        Config(model=ModelConfig(quantization="bnb_4bit"), adapter=FullConfig())


@pytest.mark.skipif(torch.cuda.is_available() or not has_bitsandbytes, reason="needs bitsandbytes and no GPU")
def test_bitsandbytes_weights_need_a_gpu(model):
    with pytest.raises(ValueError, match="torchao_int8, torchao_float8 or null without a CUDA GPU, got 'bnb_4bit'"):
        Policy.from_pretrained(model, quantization="bnb_4bit", device="cpu")


def test_rows_are_padded_to_the_sizes_that_were_compiled():
    def sizes(rows):
        return [piece.tolist() for piece in padded_pieces(rows, (2, 4))]

    assert sizes(1) == [[0, 0]]
    assert sizes(3) == [[0, 1, 2, 2]]
    assert sizes(4) == [[0, 1, 2, 3]]
    assert sizes(9) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 8]]


def one_block_pipeline():
    pipeline = tiny_stable_diffusion()
    pipeline.unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )
    return pipeline


def test_a_compiled_policy_keeps_the_first_ratio_and_compiles_once_per_size():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sampler, adapter = SamplerConfig(num_steps=3, guidance_scale=3.0), LoraConfig(rank=2)
    policy = Policy(one_block_pipeline(), sampler=sampler, adapter=adapter)
    eager = sampled(policy)
    policy.compile((4,), backend="aot_eager")
    path = sampled(policy)  # 3 rows, padded to 4
    torch.testing.assert_close(path.latents, eager.latents, rtol=1e-4, atol=1e-5)
    for rows in (torch.arange(3), torch.arange(2), torch.tensor([0])):
        distribution = policy(2, path.latents[rows, 2], path.condition.index(rows))
        log_ratio = distribution.log_prob(path.latents[rows, 3]) - path.log_probs[rows, 2]
        assert log_ratio.abs().max() < 1e-5 * 1024
    (-log_ratio.sum()).backward()
    assert all(parameter.grad is not None for parameter in policy.trainable().values())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "one without and one with gradients"


def test_trajectories_on_the_cpu_and_offloading_give_the_same_run(model, tmp_path):
    device = run(tmp_path / "device", model, epochs=1)
    cpu = run(tmp_path / "cpu", model, "--batch.trajectories", "cpu", "--model.offload", "true", epochs=1)
    assert reproducible(device) == reproducible(cpu)
    expected, obtained = weights(device, "weights"), weights(cpu, "weights")
    assert all(torch.equal(expected[name], obtained[name]) for name in expected)


@pytest.mark.parametrize("make", [tiny_stable_diffusion, tiny_sdxl, tiny_sd3, tiny_flux])
def test_decoding_leaves_the_text_encoders_where_they_are(make, monkeypatch):
    flow = make in (tiny_sd3, tiny_flux)
    sampler = SamplerConfig(kind="flow_sde" if flow else "ddim", num_steps=2, guidance_scale=1.0)
    policy = Policy(make(), sampler=sampler, offload=True)
    latents = torch.randn(2, *policy.latent_shape)
    images = policy.decode(latents)
    moved = []
    to = nn.Module.to
    monkeypatch.setattr(
        nn.Module, "to", lambda self, *a, **k: (moved.append(type(self).__name__), to(self, *a, **k))[1]
    )
    again = policy.decode(latents)
    assert torch.equal(images, again)
    assert "AutoencoderKL" in moved
    assert not {name for name in moved if "Text" in name or "T5" in name}
    assert policy.pipeline.text_encoder is not None


def test_sliced_and_tiled_decoding_by_the_vae():
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=2))
    latents = torch.randn(3, *policy.latent_shape)
    whole = policy.decode(latents)
    policy.save_decoding_memory(slicing=True)
    assert policy.pipeline.vae.use_slicing
    torch.testing.assert_close(policy.decode(latents), whole)
    policy.save_decoding_memory(tiling=True)
    assert policy.pipeline.vae.use_tiling


def test_slicing_without_a_vae_that_can_is_refused():
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=2))
    policy.pipeline.vae = None
    with pytest.raises(ValueError, match="vae_slicing must be false .NoneType cannot do it., got True"):
        policy.save_decoding_memory(slicing=True)
