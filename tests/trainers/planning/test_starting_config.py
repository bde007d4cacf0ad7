"""`ddpo new`: what it writes can be read, planned, and fits the card by the estimate."""

import pytest
import yaml

from ddpo.validation import UserError
from tests.tiny import tiny_stable_diffusion
from trainers.cli import main
from trainers.config.io import config_of, load_config
from trainers.planning.architectures import STACKS_GUIDANCE
from trainers.planning.estimate.blueprint import read_blueprint
from trainers.planning.estimate.cards import Card
from trainers.planning.estimate.memory import estimate
from trainers.planning.plan import expected_plan
from trainers.planning.starting_config import FAMILIES, Start, fitted, starting_config


def read(text, tmp_path):
    (tmp_path / "new.yaml").write_text(text)
    return load_config(tmp_path / "new.yaml")


def peak(keys, **batch):
    config = config_of({**keys, "batch": {**keys["batch"], **batch}})
    return estimate(config, read_blueprint(config.model.path), expected_plan(config, num_processes=1)).peak


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    sizes = {"samples_per_epoch": 32, "group_size": 8, "sample_batch_size": 8, "train_batch_size": 8}
    return {"model": {"path": str(folder)}, "sampler": {"num_steps": 4}, "batch": sizes}


def test_the_batches_fit_and_twice_them_would_not(keys):
    capacity = peak(keys, sample_batch_size=1, train_batch_size=5)
    found = fitted(keys, capacity)
    sample, train = found["batch"]["sample_batch_size"], found["batch"]["train_batch_size"]
    assert "gradient_checkpointing" not in found["model"]
    assert peak(found) <= capacity
    assert train == 4 and peak(found, train_batch_size=8) > capacity
    assert sample == 16 or peak(found, sample_batch_size=2 * sample) > capacity


def test_memory_is_saved_only_where_nothing_fits_without(keys):
    saving = {**keys, "model": {**keys["model"], "gradient_checkpointing": True}}
    plain, saved = (peak(one, sample_batch_size=1, train_batch_size=1) for one in (keys, saving))
    assert saved < plain
    assert fitted(keys, (saved + plain) // 2)["model"]["gradient_checkpointing"] is True
    assert fitted(keys, 1000) is None


def test_what_fits_no_card_is_refused(keys, monkeypatch):
    monkeypatch.setattr(Card, "usable", 1000)
    with pytest.raises(UserError, match="--gpu 1: .* does not fit"):
        starting_config(Start(name="new", model=keys["model"]["path"], rewards=["brightness"], gpu=1))


def test_every_family_that_is_planned_has_settings_to_begin_with():
    assert FAMILIES.keys() == STACKS_GUIDANCE.keys()


@pytest.mark.parametrize(
    "model", ["shapes", "stabilityai/stable-diffusion-3.5-medium", "black-forest-labs/FLUX.1-dev", "some/other-model"]
)
def test_the_file_says_what_it_is_for_and_can_be_planned(model, tmp_path):
    text = starting_config(Start(name="new", model=model, rewards=["brightness", "jpeg_compressibility"]))
    config = read(text, tmp_path)
    assert text.startswith(f"# brightness + jpeg_compressibility on {model}.\n")
    assert (config.model.path, [term.name for term in config.rewards]) == (
        model, ["brightness", "jpeg_compressibility"]
    )  # fmt: skip
    expected_plan(config, num_processes=1)
    assert ("ddpo check" in text) == (model == "some/other-model")


def test_names_that_yaml_would_read_otherwise_are_quoted(tmp_path):
    (tmp_path / "my rewards.py").write_text("def yes(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    reward = f"{tmp_path}/my rewards.py:yes"
    text = starting_config(Start(name="new", model="shapes", rewards=[reward], prompts="no: #1.txt"))
    assert yaml.safe_load(text)["prompts"] == {"source": "no: #1.txt"}
    assert read(text, tmp_path).rewards[0].name == reward


def test_the_command_writes_a_file_once_and_says_what_is_next(tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    new = ["new", str(tmp_path / "mine"), "--model", str(tmp_path / "model"), "--reward", "brightness", "--gpu", "24"]
    assert main(new) == 0
    assert f"next: ddpo plan {tmp_path / 'mine.yaml'}" in capsys.readouterr().out
    assert load_config(tmp_path / "mine").model.path == str(tmp_path / "model")
    assert main(new) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["new", str(tmp_path / "other"), "--reward", "brightnes"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert not (tmp_path / "other.yaml").exists()
