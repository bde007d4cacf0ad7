"""Loading a pretrained pipeline, and what is said when it cannot be."""

import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ddpo import Policy, SamplerConfig, rollout
from ddpo.loading import load_pipeline
from ddpo.validation import FieldError
from tests.ddpo.single_file import write_single_file
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
    with pytest.raises(FieldError, match="path must be a folder, a hub id .*, got '~/nothing'"):
        Policy.from_pretrained("~/nothing", sampler=SAMPLER)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no_such_folder", "no-such-name", "three/part/id"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(FieldError, match=f"path must be a folder, a hub id .*, got '{path}'"):
        Policy.from_pretrained(path, sampler=SAMPLER)


def test_a_hub_model_that_cannot_be_reached_is_named():
    with pytest.raises(FieldError, match="path must be a pipeline that can be loaded .*, got 'nobody/no-such-model'"):
        Policy.from_pretrained("nobody/no-such-model", sampler=SAMPLER)


@pytest.mark.parametrize(
    ("cause", "offline", "said"),
    [
        (GatedRepoError, False, "it is gated: accept its licence"),
        (RepositoryNotFoundError, False, "the hub has no such model, or it is private"),
        (RevisionNotFoundError, False, "it has no revision 'v9'"),
        (ConnectionError, False, "the hub cannot be reached: connect to the network"),
        (ConnectionError, True, "it is not in the cache, and HF_HUB_OFFLINE forbids the network"),
    ],
)
def test_a_hub_failure_says_what_to_do(monkeypatch, cause, offline, said):
    def fail(*_, **__):
        try:
            raise cause.__new__(cause)
        except cause as error:
            raise OSError("Cannot load model: the model is not fully cached locally (...)") from error

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(FieldError, match=re.escape(said)):
        load_pipeline("owner/name", dtype=torch.float32, revision="v9")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    write_single_file(tiny_stable_diffusion(), file)
    return file


def test_a_single_file_loads_as_the_same_policy(single, saved):
    """With the settings of another model of the same kind, whose weights differ."""
    other = shutil.copytree(saved, single.parent / "settings", ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = Policy.from_pretrained(single, config=str(other), sampler=SAMPLER, device="cpu")
    built = make_policy(num_steps=2)
    one, two = (rollout(p, p.encode(["a cat"]), torch.tensor([3])) for p in (loaded, built))
    torch.testing.assert_close(one.latents, two.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.decode(one.final), built.decode(one.final), rtol=1e-4, atol=1e-4)


def test_a_single_file_without_settings_at_hand_says_where_to_name_them(single):
    """diffusers takes the weights for those of Stable Diffusion 1.5, whose settings are on the hub."""
    with pytest.raises(FieldError, match="config must be a folder of a pipeline of the same kind.*diffusion-v1"):
        load_pipeline(single, dtype=torch.float32)
    (single.parent / "cut.safetensors").write_bytes(single.read_bytes()[:1000])
    with pytest.raises(FieldError, match="path must be a file of weights"):
        load_pipeline(single.parent / "cut.safetensors", dtype=torch.float32)


def test_a_single_file_of_other_sizes_than_the_settings_is_refused(single, saved, tmp_path):
    settings = shutil.copytree(saved, tmp_path / "settings")
    config = settings / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(FieldError, match="path must be a file that can be loaded .as StableDiffusionPipeline with the"):
        load_pipeline(single, config=str(settings), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "fp16"}, "variant must be null for a single file"),
        ({"revision": "main"}, "revision must be null for a single file"),
        ({"quantization": "torchao_int8"}, "quantization must be null for a single file"),
    ],
)
def test_options_of_folders_are_refused_for_a_single_file(single, options, said):
    with pytest.raises(FieldError, match=said):
        load_pipeline(single, dtype=torch.float32, **options)


def test_settings_beside_a_folder_and_files_that_may_run_code_are_refused(saved, tmp_path):
    with pytest.raises(FieldError, match="config must be null: .* is no single file"):
        load_pipeline(saved, dtype=torch.float32, config="x")
    (tmp_path / "x.ckpt").write_bytes(b"0")
    with pytest.raises(FieldError, match="path must be a .safetensors file, or a folder"):
        load_pipeline(tmp_path / "x.ckpt", dtype=torch.float32)


def test_a_folder_of_one_variant_comes_with_the_cure(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="400KB")
    with pytest.raises(FieldError, match=r"variant must be fp16: .*half has no other weights, got None"):
        load_pipeline(tmp_path / "half", dtype=torch.float32)
    assert load_pipeline(tmp_path / "half", dtype=torch.float32, variant="fp16").unet


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FieldError, match="save_pretrained has written, with model_index.json, got"):
        Policy.from_pretrained(tmp_path, sampler=SAMPLER)


def test_a_pipeline_without_its_denoiser_is_refused(damaged):
    shutil.rmtree(damaged / "unet")
    with pytest.raises(FieldError, match="path must be a pipeline that can be loaded .*, got '/"):
        Policy.from_pretrained(damaged, sampler=SAMPLER)


def test_truncated_weights_are_refused_with_the_path(damaged):
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FieldError, match="path must be a pipeline that can be loaded .*, got '/"):
        Policy.from_pretrained(damaged, sampler=SAMPLER)


def test_an_unsupported_scheduler_is_refused_before_sampling(damaged):
    config = damaged / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"thresholding": false', '"thresholding": true'))
    with pytest.raises(ValueError, match="thresholding"):
        Policy.from_pretrained(damaged, sampler=SAMPLER)


def test_a_safety_checker_that_the_pipeline_cannot_do_without_stays(monkeypatch, tmp_path):
    """Cosmos has no option to leave it out: with one written into its configuration it would not be a pipeline."""

    class Checker(torch.nn.Module):
        pass

    class Needs(DiffusionPipeline):
        def __init__(self, safety_checker, scheduler):
            super().__init__()
            self.register_modules(safety_checker=safety_checker, scheduler=scheduler)

    pipeline = Needs(Checker(), DDIMScheduler())
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipeline)
    loaded = load_pipeline(tmp_path, dtype=torch.float32)
    assert isinstance(loaded.components["safety_checker"], Checker)
