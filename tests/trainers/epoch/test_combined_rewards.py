"""Several rewards in a real run: groups across batches, constraints, normalisation, curriculum, shaping, GDPO."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpo.credit.lagrangian import Constraint
from rewards import Reward, RewardError, RewardTerm, WeightedSum
from tests.trainers.loop_helpers import reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.io import ConfigError, load_config
from trainers.epoch.score import gather_components
from trainers.evaluation.evaluator import _check_alike
from trainers.loop import resume
from trainers.run_folder.checkpoint import latest_checkpoint
from trainers.run_folder.folder import read_metrics
from trainers.scoring.scorer import Scorer, scoring_threads
from trainers.scoring.whole_groups import GroupBuffer

EVERYTHING = """\
constraints:
  - {reward: redness, at_least: 0.1, penalty: 2, rate: 0.5}
  - {reward: kl, at_most: 1.0e-5, penalty: 3}
shaping: {steps: [0, 2], strength: 0.5}
"""
REWARDS = (
    "--rewards.0.normalize", "prompt_zscore", "--rewards.0.schedule", "{epochs: [0, 2], factors: [0.5, 1.5]}",
    "--rewards.1.name", "diversity", "--rewards.1.normalize", "zscore", "--kl.kind", "fixed", "--kl.alpha", "0",
    "--batch.sample_batch_size", "3", "--evaluation.images_per_prompt", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs with everything."""
    return start(
        write_config(tmp_path_factory.mktemp("whole"), model, extra=EVERYTHING), "--run.name", "whole", *REWARDS
    )


def test_constraints_statistics_and_weights_resume_bit_exactly(whole: Path, model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model, extra=EVERYTHING)
    parts = start(config, "--run.name", "parts", "--epochs", "1", *REWARDS)
    resume(parts, ["--epochs", "3"])
    groups = ("weights", "optimizer", "ema")
    first, second = weights(whole, *groups), weights(parts, *groups)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert reproducible(whole) == reproducible(parts)
    values = [json.loads((latest_checkpoint(run) / "values.json").read_text()) for run in (whole, parts)]
    assert values[0]["multipliers"] == values[1]["multipliers"]
    assert values[0]["reward"] == values[1]["reward"]
    assert set(values[0]["reward"]["brightness"]["prompts"]) <= {"a cat", "a dog", "a bird", "a fish", "a horse"}


def test_the_multipliers_follow_the_logged_means_by_hand(whole: Path) -> None:
    rows = read_metrics(whole)
    red, kl = 0.0, 0.0
    for row in rows:
        assert row["constraint/redness/multiplier"] == pytest.approx(red, abs=1e-9)
        violation = 0.1 - row["constraint/redness/mean"]
        assert row["constraint/redness/weight"] == pytest.approx(max(0, red + 2 * violation), abs=1e-9)
        assert row["constraint/redness/mean"] == pytest.approx(row["reward/redness"], rel=1e-5)
        red = max(0.0, red + 0.5 * violation)
        assert row["constraint/kl/mean"] == pytest.approx(row["kl/path_nats"], rel=1e-6)
        assert row["kl/alpha"] == pytest.approx(max(0, kl + 3 * (row["kl/path_nats"] - 1e-5)), abs=1e-9)
        kl = max(0.0, kl + 3 * (row["kl/path_nats"] - 1e-5))
    assert red > 0 and rows[-1]["kl/alpha"] > 0
    assert all(np.isfinite(row["shaping/explained"]) for row in rows)


def test_a_group_that_is_spread_over_sample_batches_scores_as_in_one(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    rows = {}
    for size in (3, 8):
        options = (
            "--rewards.0.name",
            "diversity",
            "--rewards.0.normalize",
            "none",
            "--batch.group_size",
            "4",
            "--batch.sample_batch_size",
            str(size),
        )
        run = start(config, "--run.name", f"b{size}", "--epochs", "1", *options, "--evaluation.images_per_prompt", "5")
        rows[size] = read_metrics(run)[0], load_file(run / "evaluations" / "epoch_000000.safetensors")
    (one, first), (two, second) = rows[3], rows[8]
    assert one["reward/diversity"] == pytest.approx(two["reward/diversity"], rel=1e-3)
    assert one["reward/diversity/group"] == pytest.approx(one["reward/diversity"], rel=1e-5)
    torch.testing.assert_close(first["value.diversity/group"], second["value.diversity/group"], rtol=1e-3, atol=1e-6)
    assert torch.equal(first["value.reward"], first["value.diversity"]), "the evaluation's own measure is another one"
    assert "value.pixel_diversity" in first
    groups = first["value.diversity/group"].view(2, 5)
    assert (groups == groups[:, :1]).all(), "one diversity for each prompt of the evaluation"


def test_two_processes_agree_with_one_on_groups_statistics_and_multipliers(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model, extra=EVERYTHING)
    values, rows = [], []
    for count in (1, 2):
        name = ["--run.name", f"p{count}", "--epochs", "2", *REWARDS, "--evaluation.every_epochs", "0"]
        all_succeed(command, ["train", str(config), *name], count=count, log=tmp_path / f"p{count}.log")
        run = tmp_path / "runs" / f"p{count}"
        values.append(json.loads((latest_checkpoint(run) / "values.json").read_text()))
        rows.append(reproducible(run)[0])
    keys = (
        "reward/brightness",
        "reward/diversity",
        "reward/redness",
        "constraint/kl/mean",
        "constraint/redness/weight",
    )
    for key in keys:
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3, abs=1e-6), key
    for name, multiplier in values[0]["multipliers"].items():
        assert values[1]["multipliers"][name] == pytest.approx(multiplier, rel=2e-2, abs=1e-5)
    mean = values[0]["reward"]["brightness"]["mean"]
    assert values[1]["reward"]["brightness"]["mean"] == pytest.approx(mean, rel=1e-3)


def test_gdpo_trains(model: Path, tmp_path: Path) -> None:
    options = ("--advantages.combination", "gdpo", "--rewards.1.name", "redness", "--epochs", "2")
    options = (*options, "--batch.group_size", "4")  # of two samples, two opposed rewards leave nothing
    rows = read_metrics(start(write_config(tmp_path, model), *options))
    assert all(row["optimizer/grad_norm"] > 0 for row in rows)


def test_a_component_can_be_bounded_and_an_unknown_one_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def both(x, p, m):\n    r = x.mean((1, 2, 3))\n    return {'score': r, 'half': r / 2}\n")
    for name, fine in (("both/half", True), ("both/third", False)):
        extra = f"constraints: [{{reward: {name}, at_most: 0.1}}]\n"
        options = ("--rewards.0.name", f"{file}:both", "--epochs", "1", "--run.name", name.replace("/", "-"))
        config = write_config(tmp_path, model, extra=extra)
        if fine:
            assert "constraint/both/half/mean" in read_metrics(start(config, *options))[0]
        else:
            with pytest.raises(
                ValueError, match="no reward or component 'both/third'; this run reports both, both/half"
            ):
                start(config, *options)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("constraints: [{reward: redness}]", r"constraints\.0\.at_least: must be given, or at_most"),
        ("constraints: [{reward: kl, at_most: 3}]", r"kl\.kind: must be fixed with a constraint on kl"),
        (
            "shaping: {steps: [3]}",
            r"shaping\.steps: must be at least 0 and below the number of denoising steps, 3, got 3",
        ),
        (
            "shaping: {steps: [0]}\nadvantages: {combination: gdpo}",
            r"advantages\.combination: must be sum with shaping\.steps",
        ),
        ("evaluation_: {}", "unknown key"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(tmp_path, Path("nowhere"), extra=extra + "\n"))


def test_what_only_a_constraint_names_is_scored_with_weight_zero() -> None:
    config = Config(
        rewards=(RewardTerm(name="my.py:mine"),),
        constraints=tuple(Constraint(reward=name, at_most=1.0) for name in ("mine", "mine/part", "redness", "kl")),
    )
    assert [(term.name, term.weight) for term in config.terms] == [("my.py:mine", 1.0), ("redness", 0.0)]


def test_constraints_know_rewards_by_label_and_what_servers_score_by_its_name() -> None:
    config = Config(
        rewards=(RewardTerm(name="my.py:mine", label="own"), RewardTerm(name="remote", options={"reward": "ocr"})),
        constraints=tuple(Constraint(reward=name, at_most=1.0) for name in ("own", "own/part", "ocr", "my.py:mine")),
    )
    assert [(term.name, term.weight) for term in config.terms[2:]] == [("my.py:mine", 0.0)]


def test_the_buffer_hands_on_whole_groups_in_order() -> None:
    buffer = GroupBuffer(3)
    images = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 2, 2)
    seen = []
    for rows in ((0, 2), (2, 4), (4, 7)):
        part = images[slice(*rows)]
        for batch in buffer.add(part, [str(i) for i in range(*rows)], [{}] * len(part)):
            assert [int(x) for x in batch.images[:, 0, 0, 0]] == [int(prompt) for prompt in batch.prompts]
            assert batch.groups == [i // 3 for i in range(len(batch.prompts))]
            seen.append(list(batch.prompts))
    assert seen == [["0", "1", "2"], ["3", "4", "5"]]


def test_scorers_that_share_threads_collect_their_own_batches_in_order() -> None:
    reward = WeightedSum.of(Reward(name="level", function=lambda x, p, m: x.mean((1, 2, 3))))
    with scoring_threads(2) as threads:
        final, predicted = Scorer(reward, threads), Scorer(reward, threads)
        for scorer, level in ((final, 0.25), (predicted, 0.5), (final, 0.75)):
            scorer.submit(torch.full((1, 3, 2, 2), level), ["a"], [{}])
        assert predicted.collect()["level"].tolist() == [0.5]
        assert final.collect()["level"].tolist() == [0.25, 0.75]


def fickle(images, prompts, metadata):
    """Reports a component only for cats."""
    scores = images.mean((1, 2, 3))
    return {"score": scores, "cat": scores} if prompts[0] == "a cat" else {"score": scores}


def test_batches_with_other_components_are_refused_by_name() -> None:
    reward = WeightedSum.of(
        Reward(name="fickle", function=fickle), Reward(name="level", function=lambda x, p, m: x.mean((1, 2, 3)))
    )
    with scoring_threads(1) as threads:
        scorer = Scorer(reward, threads)
        for prompt in ("a cat", "a dog"):
            scorer.submit(torch.zeros(1, 3, 2, 2), [prompt], [{}])
        message = r"reward 'fickle' reports other components for one batch \(none\) .* the first \(fickle/cat\)"
        with pytest.raises(RewardError, match=message):
            scorer.collect()


def test_a_reward_that_exits_in_a_thread_is_an_error_that_names_it() -> None:
    reward = WeightedSum.of(Reward(name="leaves", function=lambda x, p, m: sys.exit(0)))
    with scoring_threads(1) as threads:
        scorer = Scorer(reward, threads)
        scorer.submit(torch.zeros(1, 3, 2, 2), ["a cat"], [{}])
        with pytest.raises(RewardError, match=r"reward 'leaves' called exit\(0\) .*prompt 'a cat'"):
            scorer.collect()


class TwoProcesses:
    """The first of two processes, as the other one's component names come in."""

    def __init__(self, other: list[str]) -> None:
        self._other = other

    def gather_json(self, value: object) -> list[object]:
        return [value, self._other]

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values])


def test_processes_with_other_components_are_refused_on_all() -> None:
    scores = {"a": torch.ones(1), "a/x": torch.zeros(1)}
    assert gather_components(scores, TwoProcesses(["a/x", "a"]))["a"].tolist() == [1.0, 1.0]
    with pytest.raises(RewardError, match=r"reward 'a' reports other components for one batch \(a/y\)"):
        gather_components(scores, TwoProcesses(["a", "a/y"]))


def test_an_evaluation_whose_batches_have_other_components_names_the_held_out_reward() -> None:
    first = {"fickle": 0, "heldout/fickle": 0, "heldout/fickle/cat": 0}
    _check_alike(first, list(reversed(first)))
    with pytest.raises(RewardError, match=r"'fickle' reports other components for one batch \(none\)"):
        _check_alike(first, ["fickle", "heldout/fickle"])
