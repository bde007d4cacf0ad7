"""The doctor on runs of the real trainer; `python -m tests.trainers.diagnosis.patients` has all of them."""

import dataclasses
import io
import math

import pytest

from tests.trainers.diagnosis.patients import HEALTHY, SICK, diagnose, run
from trainers.diagnosis.course import read_course, rise
from trainers.diagnosis.finding import sparkline
from trainers.diagnosis.watch import Watch
from trainers.run_folder.folder import RunFolder, read_metrics

QUICK = ("rate / 100", "constant reward", "saturated groups", "clip 1e-9", "groups of 2", "KL weight x 1000",
         "gradients overflow", "guidance in sampling only", "slow reward")  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_a_sick_run_is_recognised(name):
    assert set(SICK[name].expect.split("|")) & set(diagnose(SICK[name]))


@pytest.mark.parametrize("name", ["seed 0", "free KL", "guided"])
def test_a_healthy_run_raises_no_alarm(name):
    assert diagnose(HEALTHY[name]) == {}


@pytest.fixture(scope="module")
def collapsing(tmp_path_factory):
    """The folder and the printed lines of a run whose rate is far too large."""
    folder = tmp_path_factory.mktemp("runs")
    printed = io.StringIO()
    path = run(dataclasses.replace(SICK["rate x 50"], epochs=14), folder, printed=printed)
    return path, [line for line in printed.getvalue().splitlines() if "WARNING" in line]


def test_a_running_run_is_warned_of_each_finding_once(collapsing):
    path, warned = collapsing
    names = [line.partition("WARNING: ")[2].partition(":")[0] for line in warned]
    assert "rate too large" in names and len(set(names)) == len(names)
    assert all("change " in line and f"(ddpo doctor {path})" in line for line in warned)


def test_what_was_said_before_a_resume_is_not_said_again(collapsing):
    path, _ = collapsing
    folder, rows = RunFolder(path=path), read_metrics(path)
    again = Watch(folder, read_course(folder).config)
    assert again.look(rows[-1]) == []


@pytest.mark.parametrize("name", ["seed 1", "groups of 4"])
def test_no_epoch_of_a_healthy_run_is_warned_of(name, tmp_path):
    printed = io.StringIO()
    run(HEALTHY[name], tmp_path, printed=printed)
    assert "WARNING" not in printed.getvalue()


def test_a_rise_is_in_standard_errors_of_successive_differences():
    change, errors = rise([0.0, 1.0] * 6 + [10.0, 11.0] * 6)
    noise = (11 + 11 + 81) / (2 * 23)  # one jump of 9 among steps of 1, in 23 differences
    assert (change, errors) == pytest.approx((10.0, 10.0 / math.sqrt(2 * noise / 8)))
    assert rise([1.0, 2.0]) == (0.0, 0.0)


def test_a_sparkline_goes_from_least_to_largest():
    assert sparkline([0.0, 1.0, 2.0]) == "▁▅█"
    assert sparkline([1.0, 1.0]) == "▁▁"
