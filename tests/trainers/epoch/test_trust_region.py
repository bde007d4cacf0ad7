"""Natural gradient and TRPO through the whole trainer: length, search, resumes, processes, plans, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpo import LoraConfig
from ddpo.objectives import PolicyGradientConfig
from tests.ddpo.test_families import PROMPTS, make
from tests.trainers.loop_helpers import assert_trained_alike, reproducible, start, weights, write_config
from tests.trainers.world import all_succeed, command
from trainers.config import Config
from trainers.config.groups import BatchConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrackingConfig
from trainers.config.io import ConfigError, load_config
from trainers.epoch.curvature import thinned
from trainers.epoch.trust_region import direction, search
from trainers.loop import resume, train
from trainers.planning.plan import expected_plan
from trainers.run_folder.folder import read_metrics

ADAMW = "optimizer: {learning_rate: 1e-3, ema_decay: 0.9, schedule: constant, warmup_updates: 2}"
TRPO = (
    "optimizer: {kind: trpo, radius: 1e-3, ema_decay: 0.9, preconditioner: diagonal, cg_iterations: 2, "
    "fisher_fraction: 1.0, backtracks: 2}"
)
MEASURED = ("kl_nats", "surrogate_gain", "step_length", "backtracks", "cg_iterations", "cg_residual")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    path = write_config(tmp_path, model)
    path.write_text(path.read_text().replace(ADAMW, TRPO))
    return path


def test_a_resume_is_bit_exact_with_the_running_diagonal(config: Path) -> None:
    whole = start(config, "--run.name", "whole")
    parts = start(config, "--run.name", "parts", "--epochs", "2")
    resume(parts, ["--epochs", "3"])
    first, second = (weights(run, "weights", "optimizer", "ema") for run in (whole, parts))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert any(name.startswith("optimizer.fisher.") for name in first)
    assert reproducible(whole) == reproducible(parts)
    for row in read_metrics(whole):
        assert all(f"optimizer/{name}" in row for name in MEASURED)
        assert row["optimizer/cg_iterations"] <= 2 and row["optimizer/cg_residual"] > 0  # may grow over single products


@pytest.mark.parametrize("kind", ["natural_gradient", "trpo"])
def test_an_update_moves_the_policy_by_the_radius(kind: str, config: Path) -> None:
    search = {"trpo": "2", "natural_gradient": "null"}[kind]
    keys = {"kind": kind, "preconditioner": "none", "backtracks": search}
    run = start(
        config, "--epochs", "1", *(word for key, value in keys.items() for word in (f"--optimizer.{key}", value))
    )
    for row in read_metrics(run):
        assert row["optimizer/kl_nats"] == pytest.approx(1e-3, rel=0.2)
        if kind == "trpo":
            assert row["optimizer/surrogate_gain"] > 0


def test_two_processes_train_as_one(config: Path, tmp_path: Path) -> None:
    runs = {}
    for count in (1, 2):
        arguments = ["train", str(config), "--run.name", f"p{count}", "--epochs", "1"]
        all_succeed(command, arguments, count=count, log=tmp_path / f"p{count}.log")
        runs[count] = tmp_path / "runs" / f"p{count}"
    assert_trained_alike(weights(runs[1], "weights"), weights(runs[2], "weights"))
    for row, other in zip(reproducible(runs[1]), reproducible(runs[2]), strict=True):
        for name in ("kl_nats", "surrogate_gain", "step_length", "cg_residual"):
            assert row[f"optimizer/{name}"] == pytest.approx(other[f"optimizer/{name}"], rel=2e-3), name


def test_the_units_that_are_measured_are_the_same_however_many_processes_share_them() -> None:
    def places(start_at: int, count: int) -> list[int]:
        rows = torch.arange(count)[:, None].expand(count, 3).flatten()
        slots = torch.zeros_like(rows)
        found = thinned(rows, slots, start=start_at, samples=7, stride=4, batch_size=2, seed=0)
        assert found.everyones == 6
        return found.places.tolist()

    assert places(0, 7) == places(0, 4) + places(4, 3) == [0, 4, 8, 12, 16, 20]


def brightness(images: torch.Tensor, prompts: list[str], metadata: list) -> torch.Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_train(family: str, tmp_path: Path) -> None:
    config = Config(
        adapter=LoraConfig(rank=2),
        objective=PolicyGradientConfig(ratio="joint", updates_per_epoch=1),
        batch=BatchConfig(samples_per_epoch=4, group_size=2, sample_batch_size=4, train_batch_size=3),
        optimizer=OptimizerConfig(kind="trpo", radius=1e-4, fisher_fraction=1.0, cg_iterations=3),
        evaluation=EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False, every_epochs=0),
        tracking=TrackingConfig(trackers=()),
        run=RunConfig(output_dir=str(tmp_path)),
        epochs=1,
    )
    rows = read_metrics(train(make(family), reward=brightness, prompts=PROMPTS, config=config))
    assert all(row["optimizer/kl_nats"] == pytest.approx(1e-4, rel=0.2) for row in rows)


# ---- the step -------------------------------------------------------------------------------------------------------


def tried(gain: list[float], nats: list[float], *, backtracks: int) -> tuple[object, list[float]]:
    placed: list[float] = []

    def moved() -> tuple[float, float]:
        return gain[len(placed) - 1], nats[len(placed) - 1]

    return search(placed.append, moved, 2.0, radius=0.01, backtracks=backtracks), placed


def test_without_a_search_the_first_step_is_taken_whatever_it_is_worth() -> None:
    found, placed = tried([-1.0], [5.0], backtracks=0)
    assert placed == [2.0] and found.factor == 2.0 and found.gain == -1.0  # type: ignore[attr-defined]


def test_a_step_that_is_too_long_is_shortened_and_one_worth_less_is_halved() -> None:
    found, placed = tried([1.0, -1.0, 0.5], [0.04, 0.01, 0.0025], backtracks=5)
    assert placed == [2.0, pytest.approx(1.0), pytest.approx(0.5)]
    assert found.backtracks == 2 and found.nats == 0.0025  # type: ignore[attr-defined]


def test_where_no_step_is_worth_anything_the_weights_go_back() -> None:
    found, placed = tried([-1.0] * 3, [0.01] * 3, backtracks=2)
    assert placed == [2.0, 1.0, 0.5, 0.0] and found.factor == 0.0  # type: ignore[attr-defined]


def test_a_step_does_not_depend_on_the_scale_of_single_weights() -> None:
    random = torch.Generator().manual_seed(0)
    root = torch.randn(8, 5, generator=random, dtype=torch.float64)  # singular
    fisher, g = root @ root.T, root @ torch.randn(5, generator=random, dtype=torch.float64)
    scale = torch.exp(torch.randn(8, generator=random, dtype=torch.float64))

    def moved(s: torch.Tensor, *, damping: float, diagonal: bool) -> torch.Tensor:
        other = s[:, None] * fisher * s
        metric = {"w": other.diag()} if diagonal else None
        found, _ = direction(
            lambda v: {"w": other @ v["w"]}, {"w": s * g}, metric=metric, damping=damping, iterations=60
        )
        return fisher @ (s * found.x["w"])

    def apart(*, damping: float, diagonal: bool) -> float:
        one, two = (moved(s, damping=damping, diagonal=diagonal) for s in (torch.ones_like(scale), scale))
        return float((one - two).norm() / one.norm())

    assert apart(damping=1e-9, diagonal=False) < 1e-3
    assert apart(damping=0.3, diagonal=True) < 1e-3, "damping in the metric diag F"
    assert apart(damping=0.3, diagonal=False) > 0.03


# ---- before weights load --------------------------------------------------------------------------------------------


def test_the_plan_counts_what_products_and_tried_steps_cost(config: Path) -> None:
    plan = expected_plan(load_config(config), num_processes=1)
    # all 8 x 3 steps; 2 iterations, another product, 4 probes; 4 looks, each with the KL's reference
    assert plan.curvature_rows == 24 * (2 + 1 + 4 + 2 * 4)
    assert f"{plan.curvature_rows:,} Fisher products and steps tried" in plan.describe()
    adamw = replace(load_config(config), optimizer=OptimizerConfig())
    assert expected_plan(adamw, num_processes=1).curvature_rows == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--optimizer.learning_rate", "1e-3"), "optimizer.learning_rate: must be null, its default, with"),
        (("--optimizer.schedule", "cosine"), "optimizer.schedule: must be constant, its default, with optimizer.kind"),
        (("--optimizer.warmup_updates", "3"), "optimizer.warmup_updates: must be 0, its default"),
        (("--optimizer.eight_bit", "true"), "optimizer.eight_bit: must be false, its default"),
        (("--optimizer.radius", "0"), "optimizer.radius: must be positive, or null"),
        (("--optimizer.fisher_fraction", "2"), r"optimizer.fisher_fraction: must be in \(0, 1\]"),
        (("--optimizer.kind", "natural_gradient", "--optimizer.backtracks", "3"), "optimizer.backtracks: must be null"),
        (("--optimizer.kind", "adamw"), "must be .*, its default, with optimizer.kind: adamw"),
        (("--model.compile", "true"), "model.compile: must be false with optimizer.kind: trpo"),
        (("--model.precision", "fp16"), "model.precision: must be fp32 or bf16 with optimizer.kind: trpo"),
        (("--distributed.strategy", "fsdp"), "distributed.strategy: must be ddp with optimizer.kind: trpo"),
        (("--objective.noise_free_steps", "pathwise"), "optimizer.kind: must be adamw with objective.kind"),
    ],
)
def test_contradictions_are_refused(config: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)


def test_an_objective_without_recorded_steps_is_refused(config: Path) -> None:
    config.write_text(
        config.read_text()
        .replace("{ratio: joint, updates_per_epoch: 2, step_fraction: 1.0}", "{kind: clean_sample, preset: nft}")
        .replace("{kind: adaptive, target: 0.01, alpha: 0.01}", "{alpha: 0}")
    )
    with pytest.raises(ConfigError, match="optimizer.kind: must be adamw with objective.kind: clean_sample"):
        load_config(config)
