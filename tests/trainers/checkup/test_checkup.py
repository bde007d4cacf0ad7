"""The look at a configuration before a run: judgements of given readings, and readings of the real trainer."""

import math
from dataclasses import replace

import pytest
import torch

from ddpo.validation import UserError
from tests.tiny import tiny_stable_diffusion
from tests.trainers.diagnosis.patients import HEALTHY, PROMPTS, SICK, Patient, made
from tests.trainers.loop_helpers import write_config
from tests.trainers.report.written_runs import write_run
from trainers.checkup.checks import findings, gradient_signal
from trainers.checkup.checkup import overfit
from trainers.checkup.disturbances import compressed, sharpness
from trainers.checkup.readings import Readings, _cosine, reduced, take
from trainers.cli import main
from trainers.config import Config
from trainers.config.groups import BatchConfig, OptimizerConfig
from trainers.config.io import config_of, load_config
from trainers.parallel.processes import Processes
from trainers.prompts import Prompt
from trainers.session import Loaded

CONFIG = Config(batch=BatchConfig(samples_per_epoch=64, group_size=4), optimizer=OptimizerConfig(learning_rate=1e-3))
TOTALS = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0])
WELL = Readings(
    groups=torch.arange(8) // 4,
    totals=TOTALS,
    again=TOTALS,
    round_trip=TOTALS + 5.0,
    jpeg=TOTALS - 0.1,
    quiet=TOTALS + 0.01,
    sharper=torch.zeros(8),
    cosine=0.5,
    moved=torch.full((4,), 0.02),
    drift=torch.full((4,), 1e-6),
    dims=16_384,
    seconds={"sample": 6.0, "reward": 1.0, "train": 1.0},
    memory_gib=2.0,
    device_gib=80.0,
)
HALF = torch.tensor([1.0, -1.0] * 4)


def judged(**changes):
    return {finding.name: finding for finding in findings(CONFIG, replace(WELL, **changes))}


def test_nothing_is_wrong_with_what_is_well_and_a_common_shift_is_no_noise():
    assert {finding.verdict for finding in judged().values()} == {"fine"}


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "cure"),
    [
        ({"totals": torch.ones(8), "again": torch.ones(8)}, "signal", "wrong", "prompts.source"),
        ({"again": TOTALS + HALF}, "same image twice", "wrong", "rewards"),
        ({"again": TOTALS + 0.2 * HALF}, "same image twice", "look", "rewards"),
        ({"jpeg": TOTALS + 2 * HALF}, "noise floor", "look", "heldout_rewards"),
        ({"quiet": TOTALS + 2.0}, "sampling noise", "look", "sampler.eta"),
        ({"sharper": torch.full((8,), math.log(3.0))}, "sampling noise", "look", "sampler.eta"),
        ({"cosine": math.nan}, "gradient", "wrong", "rewards"),
        ({"cosine": -0.1}, "gradient", "look", "--images 32"),
        ({"moved": torch.full((4,), 10.0)}, "step size", "wrong", "optimizer.learning_rate: about 5e-05"),
        ({"moved": torch.full((4,), 1e-7)}, "step size", "look", "optimizer.learning_rate: about 0.5"),
        ({"drift": torch.tensor([0.0, 0.0, 1.0, math.nan])}, "clip and drift", "wrong", "model.precision: fp32"),
        ({"memory_gib": 79.0}, "time and memory", "look", "batch.train_batch_size"),
        ({"seconds": {"sample": 1.0, "reward": 9.0}}, "time and memory", "look", "reward_processes"),
    ],
)
def test_each_sickness_is_named_with_the_key_to_change(changes, name, verdict, cure):
    finding = judged(**changes)[name]
    assert (finding.verdict, finding.cure[: len(cure)]) == (verdict, cure)


def test_the_spread_is_that_within_and_across_groups():
    evidence = judged()["signal"].evidence
    assert f"{math.sqrt(5 / 3):.3g} within a prompt and {10 / math.sqrt(2):.3g} across 2 prompts" in evidence


def test_the_images_a_gradient_needs_are_what_a_known_signal_says():
    generator = torch.Generator().manual_seed(0)
    signal = torch.full((20_000,), 0.1)
    noise = [torch.randn(20_000, generator=generator) for _ in range(2)]  # |signal|^2 / |noise|^2 = 1 / 100
    cosine = _cosine(*([signal + draw] for draw in noise))
    said = gradient_signal(
        replace(CONFIG, batch=replace(CONFIG.batch, samples_per_epoch=4)), replace(WELL, cosine=0.01)
    )
    assert "not told from the noise" in said.evidence
    assert 8 * (1 - cosine) / cosine == pytest.approx(8 * 100, rel=0.5)


def test_a_flat_picture_is_not_sharp_and_a_blurred_one_less_than_it_was():
    picture = torch.rand(1, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(picture, 3, stride=1, padding=1)
    assert float(sharpness(torch.full((1, 3, 8, 8), 0.4))) < 1e-6
    assert float(sharpness(blurred)) < float(sharpness(picture))
    assert compressed(picture).shape == picture.shape
    assert 0 < float((compressed(picture) - picture).abs().mean()) < 0.2


# ---- on the trainer --------------------------------------------------------------------------------------------------


def readings(patient: Patient, tmp_path) -> tuple[Config, Readings]:
    policy, reward, _, config = made(patient, tmp_path)
    prompts = [Prompt(text=text, metadata={}) for text in PROMPTS]
    loaded = Loaded(policy=policy, reward=reward, heldout=None, prompts=prompts, evaluation_prompts=prompts, objects=())
    return config, take(reduced(config, 32, tmp_path), loaded, Processes(device="cpu"))


def verdicts(patient, tmp_path):
    return {finding.name: finding.verdict for finding in findings(*readings(patient, tmp_path))}


def test_a_healthy_configuration_has_nothing_wrong(tmp_path):
    assert "wrong" not in verdicts(HEALTHY["seed 0"], tmp_path).values()


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("constant reward", "signal"),
        ("reward is noise", "same image twice"),
        ("rate x 50", "step size"),
        ("dropout left on", "clip and drift"),
    ],
)
def test_a_sick_configuration_is_recognised_before_its_run(name, finding, tmp_path):
    assert verdicts(SICK[name], tmp_path)[finding] == "wrong"


def test_the_kl_that_an_epoch_moves_grows_with_the_square_of_the_rate(tmp_path):
    small, large = (
        float(readings(replace(HEALTHY["one update"], rate=rate), tmp_path)[1].moved.sum()) for rate in (1e-3, 2e-3)
    )
    assert large / small == pytest.approx(4.0, rel=0.1)


def test_judged_images_are_refused(tmp_path):
    keys = {"offline": {"source": "x"}, "objective": {"kind": "preference", "preset": "dpo"}}
    with pytest.raises(UserError, match="has them judged already"):
        reduced(config_of(keys), 8, tmp_path)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_stable_diffusion().save_pretrained(folder / "model", safe_serialization=True)
    return write_config(folder, folder / "model")


def test_the_command_looks_at_a_configuration_and_leaves_nothing(config_file, capsys):
    before = sorted(config_file.parent.iterdir())
    assert main(["doctor", str(config_file), "--images", "4", "--epochs", "5"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0].split(maxsplit=1)[1] for line in lines if line.startswith(("fine", "look", "wrong"))]
    assert names == ["signal", "same image twice", "noise floor", "sampling noise", "gradient", "step size",
                     "clip and drift", "time and memory"]  # fmt: skip
    assert "5 of them" in lines[-1] or "5 of them" in lines[-2]
    assert sorted(config_file.parent.iterdir()) == before


def test_one_prompt_is_overfitted_when_asked(config_file, capsys):
    finding = overfit(load_config(config_file, ["--sampler.num_steps", "2"]), epochs=6)
    assert finding.evidence.startswith("6 epochs on one prompt changed the reward by")
    assert len(finding.series) == 6
    assert main(["doctor", str(config_file), "--overfit", "3"]) == 2
    assert "must be at least 6 epochs" in capsys.readouterr().err


def test_a_run_is_read_as_it_is(tmp_path, capsys):
    run = write_run(tmp_path)
    assert main(["doctor", str(run)]) == 0
    assert capsys.readouterr().out.startswith(("fine", "look", "wrong"))
    assert main(["doctor", str(run), "--epochs", "5"]) == 2
    assert "a run is read as it is" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "rum")]) == 2
    assert "did you mean" in capsys.readouterr().err
