"""Loading a pretrained pipeline, and what is said when it cannot be."""

import shutil

import pytest
import torch

from ddpo import Policy, SamplerConfig, rollout
from tests.ddpo.tools import SIZE, make_policy
from tests.tiny import tiny_stable_diffusion

SAMPLER = SamplerConfig(num_steps=2, **SIZE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


def test_a_saved_pipeline_loads_as_the_same_policy(saved):
    loaded = Policy.from_pretrained(saved, sampler=SAMPLER, device="cpu")
    built = make_policy(num_steps=2)
    one, two = (rollout(p, p.encode(["a cat"]), torch.tensor([3])) for p in (loaded, built))
    torch.testing.assert_close(one.latents, two.latents, rtol=1e-5, atol=1e-5)
    assert loaded.trainable(), "the default adapter is a LoRA"


def test_a_tilde_is_the_home_folder(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert Policy.from_pretrained(f"~/{saved.name}", sampler=SAMPLER, device="cpu").trainable()
    with pytest.raises(FileNotFoundError, match="'~/nothing' is neither a folder nor a hub id"):
        Policy.from_pretrained("~/nothing", sampler=SAMPLER)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no_such_folder", "no-such-name", "three/part/id"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(FileNotFoundError, match=f"model.path '{path}' is neither a folder nor a hub id"):
        Policy.from_pretrained(path, sampler=SAMPLER)


def test_a_hub_model_that_cannot_be_reached_is_named():
    with pytest.raises(FileNotFoundError, match="model.path 'nobody/no-such-model' could not be loaded: ."):
        Policy.from_pretrained("nobody/no-such-model", sampler=SAMPLER)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="without model_index.json.*save_pretrained"):
        Policy.from_pretrained(tmp_path, sampler=SAMPLER)


def test_a_pipeline_without_its_denoiser_is_refused(damaged):
    shutil.rmtree(damaged / "unet")
    with pytest.raises(FileNotFoundError, match="model.path .* could not be loaded: ."):
        Policy.from_pretrained(damaged, sampler=SAMPLER)


def test_truncated_weights_are_refused_with_the_path(damaged):
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match="model.path .* could not be loaded: ."):
        Policy.from_pretrained(damaged, sampler=SAMPLER)


def test_an_unsupported_scheduler_is_refused_before_sampling(damaged):
    config = damaged / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"thresholding": false', '"thresholding": true'))
    with pytest.raises(ValueError, match="thresholding"):
        Policy.from_pretrained(damaged, sampler=SAMPLER)
