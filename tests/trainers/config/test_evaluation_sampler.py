"""Evaluations by a sampler of their own, and `ddpo sample` that reproduces their pictures."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ddpo import LoraConfig, Policy, SamplerConfig, StepSelection
from ddpo.credit.kl import FixedKL
from ddpo.validation import FieldError
from rewards import RewardTerm, WeightedSum
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import reproducible, weights, write_config
from trainers.cli import main
from trainers.config import Config
from trainers.config.evaluation_sampler import EvaluationSampler
from trainers.config.groups import EvaluationConfig
from trainers.config.io import ConfigError, load_config, to_yaml
from trainers.evaluation.evaluator import Evaluation, Evaluator
from trainers.loop import resume, train_from_config
from trainers.parallel.processes import Processes
from trainers.planning.plan import make_plan
from trainers.prompts import Prompt
from trainers.run_folder.folder import RunFolder, read_metrics
from trainers.tracking.progress import Progress

EVALUATION = ("--evaluation.sampler.num_steps", "5", "--evaluation.sampler.guidance_scale", "3",
              "--evaluation.sampler.height", "48", "--evaluation.sampler.width", "32",
              "--evaluation.sampler.eta", "0.5")  # fmt: skip
WINDOW = ("--sampler.stochastic_steps.kind", "window", "--sampler.stochastic_steps.size", "1",
          "--sampler.stochastic_steps.shift_every_epochs", "1", "--objective.updates_per_epoch", "1")  # fmt: skip
PROMPTS = ("a cat", "a bird")  # what the evaluation of `write_config` takes: 2 of 5, spread evenly


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_stable_diffusion().save_pretrained(folder, safe_serialization=True)
    return folder


def start(config: Path, *overrides: str) -> Path:
    loaded = load_config(config, overrides)
    return train_from_config(loaded, config_yaml=to_yaml(loaded, full=True))


def sampled(folder: Path, count: int) -> torch.Tensor:
    return torch.stack([pil_to_tensor(Image.open(folder / f"{i:03d}.png")) for i in range(count)])


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of a moving window; the evaluation's batches of 3 of 4 images do not end where prompts do."""
    folder = tmp_path_factory.mktemp("run")
    batch = ("--batch.sample_batch_size", "3", "--batch.samples_per_epoch", "6")
    return start(write_config(folder, model), "--epochs", "2", *batch, *EVALUATION, *WINDOW)


def evaluated(run: Path, epoch: int) -> Evaluation:
    return Evaluation.load(RunFolder(path=run).evaluation(epoch), [text for text in PROMPTS for _ in range(2)])


def test_sample_gives_the_evaluations_pictures_bit_for_bit(run: Path, tmp_path: Path) -> None:
    shown = evaluated(run, 2).images
    assert shown.shape == (4, 3, 48, 32)
    assert not torch.equal(shown, evaluated(run, 0).images), "training has changed the pictures"
    arguments = ("sample", str(run), "--num-images", "2", "--output")
    assert main([*arguments, str(tmp_path / "both"), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]) == 0
    assert torch.equal(sampled(tmp_path / "both", 4), shown)
    assert main([*arguments, str(tmp_path / "second"), "--prompt", "a new one", "--prompt", PROMPTS[1]]) == 0
    assert torch.equal(sampled(tmp_path / "second", 4)[2:], shown[2:]), "one prompt of the two, behind another"


def test_looking_back_at_a_run_reads_only_the_weights_that_are_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    checkpoint = again / "checkpoints" / "epoch_000002"
    for name in ("optimizer", "weights", "rng_0"):
        (checkpoint / f"{name}.safetensors").unlink()
    arguments = ["sample", str(again), "--num-images", "2", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert main([*arguments, "--output", str(tmp_path / "pictures")]) == 0
    assert torch.equal(sampled(tmp_path / "pictures", 4), evaluated(run, 2).images)
    (checkpoint / "ema.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(arguments) == 2
    assert "ema.safetensors has 0 bytes" in capsys.readouterr().err


def test_sample_can_take_the_sampler_of_training_or_another_seed(run: Path, tmp_path: Path) -> None:
    arguments = ["sample", str(run), "--prompt", PROMPTS[0], "--num-images", "1", "--output"]
    assert main([*arguments, str(tmp_path / "rollout"), "--sampler", "rollout"]) == 0
    assert sampled(tmp_path / "rollout", 1).shape == (1, 3, 32, 32)
    assert main([*arguments, str(tmp_path / "seed"), "--seed", "9"]) == 0
    assert not torch.equal(sampled(tmp_path / "seed", 1), evaluated(run, 2).images[:1])


def test_the_export_and_every_checkpoint_say_how_to_sample(run: Path) -> None:
    for folder in (run / "lora", run / "checkpoints" / "epoch_000001"):
        record = json.loads((folder / "samplers.json").read_text())
        assert record["rollout"]["num_steps"] == 3
        expected = {"num_steps": 5, "guidance_scale": 3.0, "height": 48, "width": 32, "eta": 0.5, "kind": "ddim"}
        assert {key: record["evaluation"][key] for key in expected} == expected
    assert "samplers.json" in (run / "checkpoints" / "epoch_000001" / "manifest.json").read_text()


def test_a_noise_free_evaluation_is_not_made_twice_and_reports_no_kl() -> None:
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(kind="ode", num_steps=2), adapter=LoraConfig(rank=2))
    evaluator = Evaluator(
        EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=True),
        [Prompt(text="a cat")],
        batch_size=2,
        processes=Processes(device="cpu"),
        progress=Progress(enabled=False),
    )
    reward = WeightedSum([RewardTerm(name="brightness")], device="cpu")
    assert set(evaluator(policy, reward, None, epoch=0).values) == {"reward", "brightness", "diversity"}


def test_every_epoch_trains_its_own_window_and_resume_takes_it_up_bit_exactly(run: Path, tmp_path: Path) -> None:
    trained = [[k for k, v in enumerate(row["per_step/log_ratio"]) if v is not None] for row in read_metrics(run)]
    assert trained == [[0], [1]]
    again = tmp_path / "again"
    shutil.copytree(run, again)
    resume(again, checkpoint="epoch_000001")
    first, second = weights(run, "weights", "optimizer"), weights(again, "weights", "optimizer")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(run) == reproducible(again)


@given(images=st.integers(1, 40), batch_size=st.integers(1, 9), count=st.integers(1, 6))
def test_every_image_is_in_one_batch_of_one_process(images: int, batch_size: int, count: int) -> None:
    config = EvaluationConfig(num_prompts=images, images_per_prompt=1)
    prompts = [Prompt(text=str(i)) for i in range(images)]
    processes, progress = Processes(device="cpu"), Progress(enabled=False)
    evaluator = Evaluator(config, prompts, batch_size=batch_size, processes=processes, progress=progress)
    batches = [batch for rank in range(count) for batch in evaluator.batches(rank, count)]
    assert [i for batch in batches for i in batch] == list(range(images))
    assert all(1 <= len(batch) <= batch_size for batch in batches)


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_every_key_of_the_sampler_can_be_set_for_evaluations_and_null_takes_trainings() -> None:
    keys = [field.name for field in dataclasses.fields(SamplerConfig)]
    assert keys == [field.name for field in dataclasses.fields(EvaluationSampler)]
    rollout = SamplerConfig(kind="cps", num_steps=10, eta=0.7, guidance_scale=4.5, height=512, width=512)
    assert EvaluationSampler().resolve(rollout) == rollout
    config = Config(sampler=rollout, evaluation=EvaluationConfig(sampler=EvaluationSampler(kind="ode", num_steps=40)))
    assert config.evaluation_sampler == dataclasses.replace(rollout, kind="ode", num_steps=40)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "cps"}, "evaluation.sampler.kind must be ddim, ddpm, lcm or ode, as sampler.kind is ddim, got 'cps'"),
        ({"num_steps": 0}, "evaluation.sampler.num_steps must be at least 1, at most 100,000, got 0"),
        ({"eta": 0.5, "kind": "ddpm"}, "evaluation.sampler.eta must be 1 with kind: ddpm .*, got 0.5"),
    ],
)
def test_an_impossible_sampler_of_evaluations_is_refused_with_its_key(keys: dict, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        Config(evaluation=EvaluationConfig(sampler=EvaluationSampler(**keys)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluation: {sampler: {num_step: 3}}", "evaluation.sampler.num_step: unknown key (did you mean 'num"),
        ("evaluation: {sampler: {kind: cps}}", "evaluation.sampler.kind: must be ddim, ddpm, lcm or ode, as"),
        ("sampler: {stochastic_steps: {kind: windows}}", "sampler.stochastic_steps.kind: must be all, window, ran"),
        ("sampler: {stochastic_steps: {size: 3}}", "sampler.stochastic_steps.size: must be null with kind: all"),
        (
            "sampler: {num_steps: 5, stochastic_steps: {kind: random, size: 6}}",
            "sampler.stochastic_steps.size: must be at most 5, the steps that can be stochastic here",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_one_line_with_the_key(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"rewards: [{{name: brightness}}]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_a_window_is_planned_with_the_steps_that_it_trains() -> None:
    """Flow-GRPO-Fast's saving: 2 of 10 steps are trained and pass through the reference, all 10 are sampled."""
    selection = StepSelection(kind="random_window", high_noise_fraction=0.5)
    config = Config(
        sampler=SamplerConfig(kind="flow_sde", eta=0.7, num_steps=10, guidance_scale=4.5, stochastic_steps=selection),
        kl=FixedKL(alpha=0.01),
    )
    assert config.sampler.max_stochastic_steps == 2
    plan = make_plan(config, num_processes=1, num_stochastic=config.sampler.max_stochastic_steps)
    assert (plan.sampling_rows, plan.training_rows) == (256 * 10 * 2, 256 * 2 * 2)
    assert plan.keeps_reference, "one pass of the reference serves logging and training"
    hidden = plan.reference_rows - 256 * 2 * 2  # the KL that the other steps would have
    assert 0 < hidden < 0.05 * plan.denoiser_rows_per_epoch
