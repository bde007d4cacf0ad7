"""The course of the learning rate: by updates, by time, and across a resume with more epochs."""

from dataclasses import replace

import pytest

from trainers.config import Config
from trainers.config.groups import OptimizerConfig
from trainers.epoch.learning_rate import factor_of, rate_factor, schedule_notice, schedule_updates


def a_run(schedule: str, *, epochs: int, **optimizer: object) -> Config:
    return Config(epochs=epochs, optimizer=OptimizerConfig(schedule=schedule, **optimizer))  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_time_ends_decays_to_its_end(schedule: str) -> None:
    """Of a thousand epochs that are planned, 40 updates fit into the minutes."""
    factors = [rate_factor(u, schedule, 0, 2000, elapsed=u / 40) for u in range(41)]
    assert factors[0] == 1.0 and factors == sorted(factors, reverse=True)
    assert factors[20] == pytest.approx(0.5) and factors[40] == pytest.approx(0.0)


def test_what_is_further_on_time_or_updates_decides() -> None:
    assert rate_factor(50, "linear", 0, 100, elapsed=0.2) == pytest.approx(0.5)
    assert rate_factor(50, "linear", 0, 100, elapsed=0.8) == pytest.approx(0.2)
    assert rate_factor(50, "constant", 0, 100, elapsed=0.8) == 1.0


def test_a_resume_with_more_epochs_jumps_and_says_so_unless_the_schedule_has_a_length_of_its_own() -> None:
    """The last of 400 updates of 100 epochs, then 200 epochs."""
    saved, longer = a_run("linear", epochs=100), a_run("linear", epochs=200)
    before, after = (factor_of(one.optimizer, 399, schedule_updates(one, 4)) for one in (saved, longer))
    assert (before, after) == (pytest.approx(0.0025), pytest.approx(0.50125))
    told = schedule_notice(saved, longer, update_index=399, updates_per_epoch=4)
    assert (
        told is not None and "is now 200 epochs long, not 100: the rate goes from 0.0025 to 0.501 of its peak" in told
    )
    assert "--optimizer.schedule_epochs 100 keeps its course" in told
    kept = replace(longer, optimizer=replace(longer.optimizer, schedule_epochs=100))
    assert factor_of(kept.optimizer, 399, schedule_updates(kept, 4)) == before
    assert schedule_notice(saved, kept, update_index=399, updates_per_epoch=4) is None


def test_a_constant_rate_has_nothing_to_tell() -> None:
    runs = [a_run("constant", epochs=epochs) for epochs in (100, 200)]
    assert schedule_notice(*runs, update_index=399, updates_per_epoch=4) is None


def test_a_schedule_ends_at_its_final_rate_and_stays_there() -> None:
    for schedule in ("linear", "cosine"):
        options = OptimizerConfig(schedule=schedule, final_rate=0.1)  # type: ignore[arg-type]
        assert [factor_of(options, update, 10) for update in (0, 10, 25)] == pytest.approx([1.0, 0.1, 0.1])
        assert factor_of(options, 5, 10) == pytest.approx(0.55)
