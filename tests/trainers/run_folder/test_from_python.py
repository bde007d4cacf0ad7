"""`train` from Python: what is recorded of its objects, and what the commands then refuse."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig
from ddpo.validation import UserError
from rewards import RewardTerm, WeightedSum, as_reward, registry, resolve
from rewards.builtin.color import brightness
from tests.tiny import tiny_stable_diffusion
from trainers.analysis.evaluation_pictures import pictures_of
from trainers.cli import main
from trainers.config import Config
from trainers.config.groups import (
    BatchConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrackingConfig,
)
from trainers.config.io import ConfigError, load_config
from trainers.epoch.state import TrainState
from trainers.loop import _as_sum, train
from trainers.prompts import Prompt, PromptConfig, PromptError, PromptStream
from trainers.run_folder.checkpoint import list_checkpoints
from trainers.run_folder.folder import RunError, read_metrics
from trainers.run_folder.python_runs import as_prompts, objects_of, with_policy

SAMPLER = SamplerConfig(num_steps=2, guidance_scale=1.0)
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


def loaded(model: Path, **options: object) -> Policy:
    return Policy.from_pretrained(
        model, **{"sampler": SAMPLER, "adapter": LoraConfig(rank=2), "device": "cpu", **options}
    )


def small(folder: Path, **changes: object) -> Config:
    options = {
        "batch": BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=8),
        "evaluation": EvaluationConfig(num_prompts=2, images_per_prompt=2, ode=False),
        "tracking": TrackingConfig(trackers=(), pictures_every_epochs=0),
        "run": RunConfig(output_dir=str(folder), name="run"),
        "epochs": 1,
        **changes,
    }
    return Config(**options)


def dark(images, prompts, metadata):
    return 1 - images.mean((1, 2, 3))


def test_all_weights_are_trained_at_their_own_learning_rate_and_the_record_says_so(model: Path, tmp_path: Path) -> None:
    policy = loaded(model, adapter=FullConfig(), precision="bf16")
    run = train(policy, reward="brightness", prompts=PROMPTS, config=small(tmp_path))
    assert read_metrics(run)[0]["optimizer/learning_rate"] == 1e-5
    saved = load_config(run / "config.yaml")
    assert (saved.adapter, saved.model.precision, saved.model.path) == (FullConfig(), "bf16", str(model))
    assert saved.sampler == SAMPLER
    assert saved.prompts.source == "given to train()"


@pytest.mark.parametrize(("precision", "scaled", "tolerance"), [("fp16", True, 1e-3), ("fp32", False, 1e-5)])
def test_loss_scale_and_gate_follow_the_policys_precision(
    model: Path, precision: str, scaled: bool, tolerance: float
) -> None:
    policy = loaded(model, precision=precision)
    config = with_policy(Config(), policy)
    reward = WeightedSum([RewardTerm(name="brightness")])
    state = TrainState.start(config, policy, reward, PromptStream([Prompt(text="a")], seed=0, shuffle=False))
    assert state.scaler.is_enabled() == scaled
    assert state.config.gate_tolerance_nats == tolerance


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"adapter": LoraConfig(rank=4)}, "adapter is LoraConfig.*rank=4.*, but the policy was made with .*rank=2"),
        ({"model": ModelConfig(precision="bf16")}, "model.precision is 'bf16', but the policy was made with 'fp32'"),
        ({"model": ModelConfig(path="elsewhere")}, "model.path is 'elsewhere', but the policy was made with '/"),
        ({"sampler": SamplerConfig(num_steps=7)}, "sampler.num_steps is 7, but the policy was made with 2"),
    ],
)
def test_a_configuration_that_contradicts_the_policy_is_refused(
    model: Path, tmp_path: Path, told: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(loaded(model), reward="brightness", prompts=PROMPTS, config=small(tmp_path, **told))
    assert list(tmp_path.iterdir()) == []


def test_what_a_configuration_says_of_memory_is_done(model: Path, tmp_path: Path) -> None:
    policy = loaded(model)
    config = small(tmp_path, model=ModelConfig(gradient_checkpointing=True))
    train(policy, reward="brightness", prompts=PROMPTS, config=config)
    assert policy.pipeline.unet.is_gradient_checkpointing


def test_prompts_and_held_out_rewards_of_the_configuration_are_used(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = small(
        tmp_path,
        prompts=PromptConfig(source=str(tmp_path / "prompts.txt")),
        heldout_rewards=(RewardTerm(name="redness"),),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    run = train(loaded(model), reward="brightness", config=config)
    shown = capsys.readouterr().out
    assert "heldout/redness" in shown
    assert main(["evaluate", str(run)]) == 0, "nothing in this run is known to Python alone"
    again = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    first = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert again["brightness"] == first["brightness"] and again["heldout/redness"] == first["heldout/redness"]


def test_a_run_from_python_can_be_looked_at_without_the_reward_that_only_python_has(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    reward = WeightedSum(
        [RewardTerm(name="dark"), RewardTerm(name="redness")], rewards=[as_reward(dark), resolve("redness")]
    )
    prompts = [Prompt(text="a cat", metadata={"colour": "red"}), "a dog"]
    run = train(loaded(model), reward=reward, prompts=prompts, config=small(tmp_path))
    shown = capsys.readouterr().out
    assert main(["train", "--resume", str(run)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "was started from Python with the reward 'dark', the reward 'redness', prompts of its own" in line
    assert f"trainers.loop.train(..., resume={str(run)!r})" in line
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr()
    (kl,) = [text.split() for text in shown.splitlines() if text.startswith("kl (nats)")]
    assert kl in [text.split() for text in printed.out.splitlines()] and "dark" not in printed.out
    assert "without scores of dark, redness, which only the program that trained has" in printed.err
    assert [picture.prompt for picture in pictures_of(run)] == ["a cat", "a cat", "a dog", "a dog"] * 2


def test_every_call_of_sample_makes_a_folder_with_a_record(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(loaded(model), reward="brightness", prompts=PROMPTS, config=small(tmp_path))
    for prompt, seed in (("a cat", 5), ("A red, red Circle!", 6)):
        assert main(["sample", str(run), "--prompt", prompt, "--seed", str(seed), "--num-images", "2"]) == 0
    folders = sorted((run / "samples").iterdir())
    assert [folder.name for folder in folders] == ["0001_a-cat", "0002_a-red-red-circle"]
    for folder, prompt, seed in zip(folders, ("a cat", "A red, red Circle!"), (5, 6), strict=True):
        record = json.loads((folder / "samples.json").read_text())
        assert (record["weights"], record["seed"], record["sampler"]["num_steps"]) == ("epoch_000001", seed, 2)
        for entry in record["images"]:
            pixels = pil_to_tensor(Image.open(folder / entry["file"])).float() / 255
            assert entry["prompt"] == prompt
            assert entry["fine-tuned"]["brightness"] == pytest.approx(
                float(brightness(pixels[None], [""], [{}])), abs=2e-3
            )
        noises = [entry["noise_seed"] for entry in record["images"]]
        assert len(set(noises)) == 2
    capsys.readouterr()
    assert main(["sample", str(run), "--prompt", "a", "--output", str(folders[0])]) == 2
    assert "exists already: choose another folder" in capsys.readouterr().err


def test_names_that_another_process_finds_are_no_objects(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register(name="only_here")(lambda images, prompts, metadata: images.mean((1, 2, 3)))
    monkeypatch.setitem(registry._registrations, "only_here", registry._registrations.pop("only_here"))
    policy, config = loaded(model), Config()
    found, made = (WeightedSum([RewardTerm(name=name)]) for name in ("brightness", "only_here"))
    assert objects_of(config, policy, found, None) == []
    assert objects_of(config, policy, made, None) == ["the reward 'only_here'"]
    assert objects_of(config, policy, found, WeightedSum.of(found.rewards[0])) == ["the reward 'brightness'"]
    in_memory = Policy(tiny_stable_diffusion(), sampler=SAMPLER, adapter=LoraConfig(rank=2))
    assert objects_of(config, in_memory, found, None) == ["a pipeline"]
    assert with_policy(config, in_memory).model.path == "StableDiffusionPipeline made in Python"


def test_a_run_goes_on_from_python_with_its_own_configuration(model: Path, tmp_path: Path) -> None:
    run = train(loaded(model), reward=dark, prompts=PROMPTS, config=small(tmp_path))
    saved = load_config(run / "config.yaml")
    assert train(loaded(model), reward=dark, prompts=PROMPTS, config=replace(saved, epochs=2), resume=run) == run
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate \(saved null, now 0.1\)"):
        config = replace(saved, epochs=3, optimizer=OptimizerConfig(learning_rate=0.1))
        train(loaded(model), reward=dark, prompts=PROMPTS, config=config, resume=run)
    with pytest.raises(ConfigError, match=r"rewards \(saved "):
        train(loaded(model), reward="brightness", prompts=PROMPTS, resume=run)
    with pytest.raises(PromptError, match="prompts of this run were given to train"):
        train(loaded(model), reward=dark, resume=run)
    with pytest.raises(ValueError, match="evaluation prompts are not what the run began with"):
        train(loaded(model), reward=dark, prompts=["a cow"], resume=run)
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2]
    train(loaded(model), reward=dark, prompts=PROMPTS, resume=run)
    assert load_config(run / "config.yaml").epochs == 2


def test_the_rewards_of_the_configuration_are_taken_where_none_are_given(model: Path, tmp_path: Path) -> None:
    terms = (RewardTerm(name="brightness", weight=2.0), RewardTerm(name="redness", weight=-1.0))
    runs = [
        train(loaded(model), reward=reward, prompts=PROMPTS, config=small(tmp_path / folder, rewards=terms))
        for folder, reward in (("named", None), ("given", WeightedSum(terms)))
    ]
    rows = [read_metrics(run)[0] for run in runs]
    assert rows[0]["reward/mean"] == rows[1]["reward/mean"]
    assert rows[0]["reward/mean"] == pytest.approx(2 * rows[0]["reward/brightness"] - rows[0]["reward/redness"])
    assert all(load_config(run / "config.yaml").rewards == terms for run in runs)
    with pytest.raises(UserError, match="needs reward= or config.rewards"):
        train(loaded(model), prompts=PROMPTS, config=small(tmp_path / "none"))


def test_a_run_whose_checkpoints_are_gone_is_refused_from_python_too(model: Path, tmp_path: Path) -> None:
    run = train(loaded(model), reward=dark, prompts=PROMPTS, config=small(tmp_path))
    (checkpoint,) = list_checkpoints(run)
    metrics = (run / "metrics.jsonl").read_bytes()
    checkpoint.rename(tmp_path / "away")
    with pytest.raises(RunError, match=r"has finished 1 epochs, but none of its checkpoints is left"):
        train(loaded(model), reward=dark, prompts=PROMPTS, resume=run)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_prompts_are_texts_or_prompts() -> None:
    assert as_prompts(["a", Prompt(text="b", metadata={"x": 1})]) == [
        Prompt(text="a"),
        Prompt(text="b", metadata={"x": 1}),
    ]
    with pytest.raises(PromptError, match=r"got the text 'a red circle'; write \['a red circle'\]"):
        as_prompts("a red circle")
    assert as_prompts([{"prompt": "x", "count": 2}]) == [Prompt(text="x", metadata={"count": 2})]
    with pytest.raises(PromptError, match="prompts: entry 1: must be a text or a dict, got int"):
        as_prompts(["x", 3])
    with pytest.raises(PromptError, match=r"prompts must be a list of texts or dicts, got ndarray; end with .tolist()"):
        as_prompts(np.array(["x"]))


def test_rewards_are_a_name_a_function_or_a_list_of_both() -> None:
    def half(images, prompts, metadata):
        return images.mean((1, 2, 3)) / 2

    images = torch.rand(2, 3, 8, 8)
    both = _as_sum(["brightness", half], torch.device("cpu"))
    assert [reward.name for reward in both.rewards] == ["brightness", "half"]
    scores = both(images, ["a", "b"], [{}, {}]).components
    torch.testing.assert_close(scores["half"], images.mean((1, 2, 3)) / 2)
    assert [term.name for term in _as_sum(["brightness", "redness"], torch.device("cpu")).terms] == [
        "brightness",
        "redness",
    ]
    assert _as_sum(half, torch.device("cpu")).rewards[0].name == "half"


def test_a_default_configuration_takes_everything_from_the_policy() -> None:
    policy = Policy.from_pretrained("shapes", adapter=LoraConfig(rank=8), device="cpu")
    config = with_policy(Config(epochs=3), policy)
    assert (config.model.path, config.adapter, config.sampler) == ("shapes", LoraConfig(rank=8), policy.sampler)
