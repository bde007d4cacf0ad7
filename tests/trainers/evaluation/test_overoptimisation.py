"""The warning on evaluations whose course is known, and a real run whose held-out reward must fall."""

import json
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import t, ttest_rel
from torchvision.transforms.functional import pil_to_tensor

import trainers.evaluating
from ddpo import LoraConfig, Policy, SamplerConfig
from rewards import Reward, RewardTerm, WeightedSum, resolve
from scripts.false_alarms import Course, covered_share, warned_share
from tests.tiny import tiny_stable_diffusion
from tests.trainers.loop_helpers import write_config
from trainers.analysis.comparison import evaluate_run
from trainers.analysis.samples import SampleRequest, sample_run
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.config.io import load_config, to_yaml
from trainers.evaluation.overoptimisation import Rule, best_epoch, find, heldout_signs, paired_z
from trainers.loop import resume, train, train_from_config
from trainers.run_folder.folder import RunFolder, read_metrics

SIGNS = {"heldout/h": 1}
IMAGES = 200
EACH = torch.arange(IMAGES)
THREE = Rule(threshold=3.0)


def course(reward, heldout, *, noise=0.3, seed=0):
    """Evaluations whose true means are given; the images' own levels are shared, as with fixed prompts and seeds."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(2, IMAGES, generator=generator)
    draw = lambda mean, own: mean + own + noise * torch.randn(IMAGES, generator=generator)  # noqa: E731
    return {
        10 * i: {"reward": draw(r, level[0]), "heldout/h": draw(h, level[1])}
        for i, (r, h) in enumerate(zip(reward, heldout, strict=True))
    }


def test_paired_z_is_scipys_paired_t_statistic():
    one, two = torch.randn(40), torch.randn(40)
    each = torch.arange(40)
    assert paired_z(one, two, each) == pytest.approx(ttest_rel(one.double(), two.double()).statistic)
    assert paired_z(one, one, each) == 0.0
    agreed = NormalDist().inv_cdf(1 - 0.5**4)  # equal differences weigh what as many agreeing signs do
    assert paired_z(torch.ones(4), torch.zeros(4), each[:4]) == pytest.approx(agreed)
    assert paired_z(torch.zeros(4), torch.ones(4), each[:4]) == pytest.approx(-agreed)
    fours = one.view(10, 4), two.view(10, 4)  # four images of each of ten captions
    statistic = ttest_rel(*(values.double().mean(1) for values in fours)).statistic
    assert paired_z(one, two, each // 4) == pytest.approx(statistic)


def test_a_held_out_reward_that_rises_then_falls_is_caught_against_its_best_evaluation():
    history = course([0, 0.5, 1.0, 1.5], [0, 0.5, 0.6, 0.1])
    (finding,) = find(history, SIGNS, EACH, rule=THREE)
    assert finding.over_optimised and finding.since == 20
    assert finding.heldout_z < -10 and finding.training_z > 10
    assert "since its best evaluation, at epoch 20" in str(finding)
    assert not find(dict(list(history.items())[:3]), SIGNS, EACH, rule=THREE)[0].over_optimised
    assert best_epoch(history, SIGNS) == 20


def test_both_falling_both_rising_and_a_held_out_reward_that_stays_are_no_over_optimisation():
    for reward, heldout in (([0, -1], [0, -1]), ([0, 1], [0, 1]), ([0, 1], [0, 0])):
        (finding,) = find(course(reward, heldout), SIGNS, EACH, rule=THREE)
        assert not finding.over_optimised


@pytest.mark.parametrize(
    "course_of",
    [Course(evaluations=10), Course(evaluations=20, captions=16), Course(evaluations=20, success_rate=0.1)],
)
def test_of_unchanged_runs_no_more_than_the_stated_share_is_warned_of(course_of):
    """Several images a caption, whose changes resemble each other; 100 runs, of which 5 may warn and 12 by chance."""
    assert warned_share(course_of, Rule(false_alarms=0.05), num_runs=100) <= 0.12


def test_a_fixed_threshold_on_independent_images_warns_of_most_unchanged_runs():
    """What made the sequential test necessary."""
    assert warned_share(Course(evaluations=20), Rule(threshold=3.0), clustered=False, num_runs=25) > 0.5


def test_a_fall_by_half_the_spread_of_an_images_change_is_seen():
    assert warned_share(Course(evaluations=10, fall=0.5), Rule(), num_runs=25) > 0.9


def test_an_interval_of_few_captions_is_students() -> None:
    """Of 8 captions x 4 Gaussian scores: the normal quantile's 95% are 92, Student's 96 (docs/rewards_combining.md)."""
    normal, student = covered_share(8, num_runs=1500)
    assert normal < 0.93 and abs(student - 0.95) < 0.02


def test_the_tails_of_all_looks_at_all_rewards_sum_to_the_stated_share():
    rule, captions, rewards = Rule(false_alarms=0.05), 30, 3
    spent = [
        rewards * look * t.sf(rule.limit(look, rewards=rewards, captions=captions), captions - 1)
        for look in range(1, 2001)
    ]
    assert sum(spent) == pytest.approx(0.05 * 2000 / 2001, rel=1e-6)


def test_a_held_out_reward_of_negative_weight_is_to_fall():
    cost = Reward(name="cost", function=lambda x, p, m: torch.zeros(len(x)))
    heldout = WeightedSum([RewardTerm(name="cost", weight=-1.0)], rewards=[cost])
    assert heldout_signs(heldout) == {"heldout/cost": -1}
    falling, rising = ({k: {"reward": v["reward"], "heldout/cost": v["heldout/h"]} for k, v in values.items()}
                       for values in (course([0, 1], [0, -1]), course([0, 1], [0, 1])))  # fmt: skip
    assert not find(falling, {"heldout/cost": -1}, EACH, rule=THREE)[0].over_optimised
    assert find(rising, {"heldout/cost": -1}, EACH, rule=THREE)[0].over_optimised
    assert best_epoch(falling, {"heldout/cost": -1}) == 10


def test_the_best_evaluation_weighs_held_out_rewards_by_their_spread():
    history = course([0, 1, 2], [0, 1, 0.5])
    for epoch, values in history.items():
        values["heldout/large"] = 1000 * (
            values["heldout/h"] - {0: 0, 10: 1, 20: 0.5}[epoch] - {0: 0, 10: 0, 20: 0.4}[epoch]
        )
    assert best_epoch(history, {"heldout/h": 1, "heldout/large": 1}) == 10


def test_one_evaluation_or_one_image_says_nothing():
    assert find(course([0], [0]), SIGNS, EACH, rule=THREE) == []
    single = {epoch: {name: value[:1] for name, value in v.items()} for epoch, v in course([0, 1], [0, -1]).items()}
    assert find(single, SIGNS, EACH[:1], rule=THREE) == []


def test_a_run_whose_held_out_reward_is_the_opposite_warns_stops_and_exports_the_best_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sampler = SamplerConfig(num_steps=2, guidance_scale=1.0)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))
    brightness = resolve("brightness")
    darkness = Reward(name="darkness", function=lambda x, p, m: -brightness(x, p, m).total)
    config = Config(
        epochs=12,
        optimizer=OptimizerConfig(learning_rate=2e-2),
        batch=BatchConfig(samples_per_epoch=16, group_size=8, sample_batch_size=16, train_batch_size=64),
        evaluation=EvaluationConfig(
            num_prompts=16, images_per_prompt=1, ode=False, every_epochs=1, stop_on_overoptimisation=True
        ),
        tracking=TrackingConfig(trackers=(), pictures_every_epochs=0),
        heldout_rewards=(RewardTerm(name="darkness"),),
        run=RunConfig(output_dir=str(tmp_path), name="greedy"),
    )
    run = train(
        policy,
        reward="brightness",
        prompts=[f"a cat on {i} mats" for i in range(16)],
        config=config,
        heldout=WeightedSum.of(darkness),
    )
    output = capsys.readouterr()
    assert "WARNING: over-optimisation at epoch" in output.out + output.err
    rows, epochs = read_metrics(run), RunFolder(path=run).evaluated_epochs()
    assert 2 <= len(rows) < 12 and rows[-1]["evaluation/overoptimised"] == 1
    records = [json.loads((run / "evaluations" / f"epoch_{epoch:06d}.json").read_text()) for epoch in epochs]
    assert [record["heldout"][0]["over_optimised"] for record in records[-2:]] == [True, True]
    heights = {record["epoch"]: record["measures"]["heldout/darkness"]["mean"] for record in records}
    best = max(heights, key=heights.__getitem__)
    kept, exported = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (run / "best" / f"epoch_{best:06d}", run / "lora")
    )
    assert kept.keys() == exported.keys() and all(torch.equal(kept[name], exported[name]) for name in kept)


def test_evaluate_and_sample_show_the_exported_weights_and_a_resume_does_not_train_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose first epoch is judged the best, and the two after it over-optimised."""

    def judge(session):  # type: ignore[no-untyped-def]
        session.state.counts.overoptimised = max(0, session.state.epoch - 1)
        return [], session.state.epoch == 1

    monkeypatch.setattr(trainers.evaluating, "_judge", judge)
    tiny_stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    overrides = [
        "--evaluation.stop_on_overoptimisation", "true", "--evaluation.every_epochs", "1", "--evaluation.ode", "false",
        "--adapter.alpha", "4", "--optimizer.learning_rate", "2e-2", "--epochs", "9", "--run.name", "greedy",
        "--heldout_rewards", "[{name: redness}]",
    ]  # fmt: skip
    config = load_config(write_config(tmp_path, tmp_path / "model"), overrides)
    run = train_from_config(config, config_yaml=to_yaml(config, full=True))
    assert [row["epoch"] for row in read_metrics(run)] == [1, 2, 3]
    kept = load_file(run / "best" / "epoch_000001" / "pytorch_lora_weights.safetensors")
    exported = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(kept[name], exported[name]) for name in kept)
    shown = {epoch: load_file(run / "evaluations" / f"epoch_{epoch:06d}.safetensors") for epoch in (1, 3)}
    assert not torch.equal(shown[1]["images"], shown[3]["images"])
    for checkpoint, epoch in ((None, 1), ("epoch_000003", 3)):
        capsys.readouterr()
        shown_side_by_side = sample_run(run, SampleRequest(prompts=["a cat"], num_images=2, checkpoint=checkpoint))
        assert f"epoch_00000{epoch}" in capsys.readouterr().err.partition("weights: ")[2].partition(";")[0]
        pictures = [pil_to_tensor(Image.open(shown_side_by_side.with_name(f"{i:03d}.png"))) for i in range(2)]
        assert torch.equal(torch.stack(pictures), shown[epoch]["images"][:2])
        folder = evaluate_run(run, checkpoint=checkpoint)
        assert folder.name == f"evaluation_epoch_00000{epoch}"
        after = json.loads((folder / "summary.json").read_text())["brightness"]["after"]["mean"]
        assert after == pytest.approx(float(shown[epoch]["value.brightness"].double().mean()), rel=1e-6)
    resume(run)
    assert len(read_metrics(run)) == 3
