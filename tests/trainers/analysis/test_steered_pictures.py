"""`ddpo sample --steer`: its pictures are those of `steered_samples`, its record says what they are and cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo import Policy, SamplerConfig
from ddpo.loading import load_pipeline
from ddpo.seeds import Purpose, sample_seeds
from ddpo.steered import steered_samples
from ddpo.steering import FeynmanKacKind
from rewards import resolve
from tests.ddpo.families import tiny_sd3, tiny_sdxl
from tests.tiny import tiny_stable_diffusion
from trainers.cli import main

SMALL = ["--sampler.num_steps", "3", "--sampler.height", "16", "--sampler.width", "16", "--num-images", "2"]
SIZED = {"redness": ("best_of_n", "reward_gradient"), "jpeg_compressibility": ("feynman_kac", "svdd")}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file)))


def sampled(capsys, *arguments) -> tuple[Path, dict]:
    assert main(["sample", *map(str, arguments)]) == 0
    picture = Path(capsys.readouterr().out.splitlines()[-1])
    assert Image.open(picture).width > 100
    return picture.parent, json.loads((picture.parent / "samples.json").read_text())


def refused(capsys, *arguments) -> str:
    assert main(["sample", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_the_pictures_are_those_of_steered_samples_and_the_record_says_what_they_are(model, capsys):
    keys = ["--steer.alpha", "0.01", "--steer.every", "1", "--rewards.0.weight", "2", "--sampler.guidance_scale", "3"]
    folder, record = sampled(
        capsys, model, "--prompt", "a cat", "--prompt", "a dog", "--steer", "feynman_kac", "--reward", "redness",
        "--reward", "brightness", "--seed", "5", *SMALL, *keys,
    )  # fmt: skip
    assert folder.name == "0001_a-cat" and folder.parent.name == "samples"
    policy = Policy(
        load_pipeline(model, dtype=torch.float32),
        sampler=SamplerConfig(num_steps=3, guidance_scale=3.0, height=16, width=16),
    )
    red, bright = resolve("redness"), resolve("brightness")
    with policy.reference():
        made = steered_samples(
            policy,
            ["a cat", "a cat", "a dog", "a dog"],
            lambda *seen: 2 * red(*seen).total + bright(*seen).total,
            steer=FeynmanKacKind(alpha=0.01, every=1),
            seeds=sample_seeds(5, 0, range(4), purpose=Purpose.EVALUATION),
            batch_size=8,
        )
    for i, (image, entry) in enumerate(zip(made.images, record["images"], strict=True)):
        assert torch.equal(pixels(folder / entry["file"]), (image * 255).round().byte().permute(1, 2, 0))
        assert entry["steered"]["reward"] == pytest.approx(float(made.scores[i]), abs=1e-6)
        assert entry["steered"]["reward"] == pytest.approx(
            2 * entry["steered"]["redness"] + entry["steered"]["brightness"], abs=1e-6
        )
        assert entry["particle"] == made.particles[i]
    assert record["cost"]["steered"]["network_rows"] == made.cost.network == 4 * 4 * 3 * 2
    assert record["cost"]["steered"]["images_scored"] == made.cost.rewards
    assert record["cost"]["unsteered"]["network_rows"] == 4 * 3 * 2
    assert record["steer"]["kind"] == "feynman_kac" and record["steer"]["alpha"] == 0.01
    assert [term["weight"] for term in record["rewards"]] == [2.0, 1.0]


@pytest.mark.parametrize(("reward", "kind"), [(reward, kind) for reward, kinds in SIZED.items() for kind in kinds])
def test_every_kind_is_sampled(model, capsys, reward, kind):
    _, record = sampled(capsys, model, "--prompt", "a cat", "--steer", kind, "--reward", reward, *SMALL)
    assert record["steer"]["kind"] == kind
    assert all({"reward", reward} == entry["steered"].keys() for entry in record["images"])


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3])
def test_other_families_take_the_sampler_that_fits_them(build, tmp_path, capsys):
    build().save_pretrained(tmp_path / "model")
    _, record = sampled(
        capsys, tmp_path / "model", "--prompt", "a cat", "--steer", "svdd", "--reward", "redness", *SMALL
    )
    assert record["sampler"]["kind"] == {tiny_sdxl: "ddim", tiny_sd3: "flow_sde"}[build]
    assert record["sampler"]["num_steps"] == 3


def test_normalised_rewards_have_the_scale_of_the_unsteered_pictures(model, capsys):
    _, record = sampled(
        capsys, model, "--prompt", "a cat", "--steer", "best_of_n", "--reward", "redness", *SMALL,
        "--rewards.0.normalize", "std", "--num-images", "4",
    )  # fmt: skip
    raw = torch.tensor([entry["unsteered"]["redness"] for entry in record["images"]]).double()
    for entry in record["images"]:
        assert entry["steered"]["reward"] == pytest.approx(
            entry["steered"]["redness"] / float(raw.std(correction=0)), rel=1e-4
        )


def test_a_run_is_steered_by_its_own_rewards_from_the_noise_of_its_plain_pictures(tmp_path, capsys):
    small = ["--epochs=1", "--batch.samples_per_epoch=4", "--batch.group_size=2", "--sampler.num_steps=2",
             "--objective.updates_per_epoch=1", "--evaluation.num_prompts=1", "--evaluation.images_per_prompt=1",
             "--evaluation.every_epochs=0", "--tracking.trackers=[]", "--adapter.rank=2", "--model.device=cpu",
             "--rewards.0.normalize=std", "--optimizer.learning_rate=0.05"]  # fmt: skip
    assert main(["train", "shapes_ppo", *small, f"--run.output_dir={tmp_path}", "--run.name=tiny"]) == 0
    asked = [tmp_path / "tiny", "--prompt", "a red circle", "--num-images", "2"]
    plain, tuned = sampled(capsys, *asked)
    folder, record = sampled(capsys, *asked, "--steer", "best_of_n", "--steer.particles", "3")
    assert plain.name == "0001_a-red-circle" and folder.name == "0002_a-red-circle"
    assert record["weights"] == tuned["weights"]
    for own, other in zip(record["images"], tuned["images"], strict=True):
        assert own["noise_seed"] == other["noise_seed"]
        assert own["unsteered"]["reward"] == pytest.approx(other["fine-tuned"]["reward"], abs=1e-4)
        assert own["steered"]["reward"] >= own["unsteered"]["reward"] - 1e-6
    _, other = sampled(capsys, *asked, "--steer", "best_of_n", "--reward", "redness", "--rewards.0.weight", "-1")
    assert [term["name"] for term in other["rewards"]] == ["redness"]
    assert "where files lie" in refused(capsys, *asked, "--steer", "svdd", "--kl.alpha", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "redness"], "--reward names what to steer by: it goes with --steer KIND"),
        (["--steer", "svdd"], "has no rewards of its own: name what to steer by, --reward NAME"),
        (["--steer", "svd", "--reward", "redness"], "argument --steer: unknown 'svd', did you mean 'svdd'?"),
        (["--steer", "svdd", "--reward", "brightnes"], "rewards.0.name: unknown reward 'brightnes'; did you mean 'bri"),
        (["--steer", "reward_gradient", "--reward", "entropy"], "entropy has no gradient by its images, which reward_"),
        (["--steer", "best_of_n", "--reward", "diversity"], "diversity compares images with each other"),
        (["--steer", "svdd", "--reward", "redness", "--sampler.kind", "ode"], "steer.kind: must be best_of_n with a"),
        (["--steer", "svdd", "--reward", "redness", "--steer.alpha", "0"], "steer.alpha: must be positive, got 0"),
        (["--steer", "svdd", "--reward", "redness", "--steer.alfa", "1"], "steer.alfa: unknown key (did you mean 'alp"),
        (
            ["--steer", "feynman_kac", "--reward", "redness", "--steer.particles", "9"],
            "steer.particles: must be at most batch.sample_batch_size, 8",
        ),
        (["--steer", "svdd", "--reward", "redness", "--checkpoint", "epoch_000001"], "--checkpoint is of a run"),
        (["--steer", "svdd", "--reward", "redness", "--image", "no.png"], "no.png"),
        (["--steer", "svdd", "--reward", "redness", "--batch.group_size", "2"], "--batch.group_size has no part in"),
        (["--steer", "svdd", "--reward", "redness", "--output", "."], "--output: . exists already"),
    ],
)
def test_what_cannot_be_steered_is_one_line(model, capsys, arguments, message):
    Path("something").touch()
    assert message in refused(capsys, model, "--prompt", "a cat", *arguments)


def test_best_of_n_needs_no_noise(model, capsys):
    given = ["--steer", "best_of_n", "--reward", "redness", *SMALL, "--sampler.kind", "ode"]
    _, record = sampled(capsys, model, "--prompt", "a cat", *given)
    assert all(entry["steered"]["reward"] >= entry["unsteered"]["reward"] - 1e-6 for entry in record["images"])


def test_a_constraint_moves_the_weights_and_is_recorded(model, capsys):
    keys = ["--steer.alpha", "0.001", "--steer.every", "1", "--num-images", "2", "--steer.particles", "8"]
    keys += ["--constraints.0.reward", "brightness", "--constraints.0.at_most"]
    given = ["--prompt", "a cat", "--steer", "feynman_kac", "--reward", "redness", *SMALL, *keys]
    _, free = sampled(capsys, model, *given, "1")
    assert free["multipliers"] == {"brightness": 0.0}
    assert free["constraints"] == [{"reward": "brightness", "at_most": 1.0}]
    assert free["cost"]["steered"]["images_scored"] > free["cost"]["unsteered"]["images_scored"]
    assert main(["sample", str(model), *map(str, given), "-1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "brightness cannot be at most -1 in the mean: the best of every sample's particles have 0." in message
    rest = ["--prompt", "a cat", "--reward", "redness", *SMALL, "--constraints.0.reward", "brightness"]
    message = refused(capsys, model, "--steer", "svdd", *rest, "--constraints.0.at_most", "1")
    assert "kept by the weights of particles" in message
    message = refused(capsys, model, *given, "1", "--constraints.0.reward", "kl")
    assert "without a constraint on kl" in message
