"""The doctor on runs of the real trainer; `python -m tests.trainers.diagnosis.patients` has all of them."""

import math

import pytest

from tests.trainers.diagnosis.patients import HEALTHY, SICK, diagnose
from trainers.diagnosis.course import rise
from trainers.diagnosis.finding import sparkline

QUICK = ("rate / 100", "constant reward", "saturated groups", "clip 1e-9", "groups of 2", "KL weight x 1000")


@pytest.mark.parametrize("name", QUICK)
def test_a_sick_run_is_recognised(name):
    assert set(SICK[name].expect.split("|")) & set(diagnose(SICK[name]))


@pytest.mark.parametrize("name", ["seed 0", "free KL"])
def test_a_healthy_run_raises_no_alarm(name):
    assert diagnose(HEALTHY[name]) == {}


def test_a_rise_is_in_standard_errors_of_successive_differences():
    change, errors = rise([0.0, 1.0] * 6 + [10.0, 11.0] * 6)
    noise = (11 + 11 + 81) / (2 * 23)  # one jump of 9 among steps of 1, in 23 differences
    assert (change, errors) == pytest.approx((10.0, 10.0 / math.sqrt(2 * noise / 8)))
    assert rise([1.0, 2.0]) == (0.0, 0.0)


def test_a_sparkline_goes_from_least_to_largest():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparkline([1.0, 1.0]) == "▁▁"
