"""Reading runs at the same reward."""

import pytest

from scripts.compare_forgetting import common_reward, read_at
from trainers.analysis.pareto import Course, Point
from trainers.evaluation.statistics import Measure


def course(*places: tuple[float, float]) -> Course:
    points = [
        Point(epoch=i, x=Measure(mean=x, error=0.1), y=Measure(mean=y, error=float(i)))
        for i, (x, y) in enumerate(places)
    ]
    return Course(run="run", points=tuple(points))


def test_a_measure_is_read_between_the_two_evaluations_beside_a_reward() -> None:
    one = course((0.0, 1.0), (2.0, 0.5), (4.0, 0.1))
    found = read_at(one, 3.5)
    assert found is not None
    assert found.value == pytest.approx(0.2) and found.error == 2.0
    assert read_at(one, 4.5) is None


def test_a_reward_is_read_where_it_is_first_reached() -> None:
    found = read_at(course((0.0, 1.0), (2.0, 0.0), (1.0, 5.0), (3.0, 9.0)), 1.5)
    assert found is not None and found.value == pytest.approx(0.25)


def test_the_common_reward_is_one_that_all_runs_have_reached() -> None:
    assert common_reward([course((0.0, 0.0), (3.0, 0.0), (2.0, 0.0)), course((0.0, 0.0), (2.5, 0.0))]) == 2.5
