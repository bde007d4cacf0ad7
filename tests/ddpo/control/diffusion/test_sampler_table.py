"""The table of samplers against published formulas: it passes, it can fail, and docs/samplers.md shows it."""

import re
from pathlib import Path

import pytest

from ddpo.control.checks.samplers import CHECKS
from ddpo.sampling import samplers

DOCS = Path(__file__).parents[4] / "docs" / "samplers.md"


def measured():
    return [found for check in CHECKS for found in check.run()]


def test_every_sampler_makes_its_published_step():
    failed = [found for found in measured() if not found.passed]
    assert failed == []


@pytest.mark.parametrize(
    ("kind", "rule", "caught"),
    [
        ("flow_sde", (samplers.flow_sde_std, samplers.exact_direction), "flow_sde: mean"),
        ("flow_sde", (samplers.dance_sde_std, samplers.euler_direction), "flow_sde: std"),
        ("dance_sde", (samplers.flow_sde_std, samplers.euler_direction), "dance_sde: std"),
        ("cps", (samplers.cps_std, samplers.euler_direction), "cps: mean"),
        ("ddim", (samplers.ddim_std, samplers.euler_direction), "ddim: mean"),
        ("ddpm", (samplers.ddim_std, samplers.euler_direction), "ddpm: next state"),
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch, kind, rule, caught):
    monkeypatch.setitem(samplers.RULES, kind, rule)
    assert caught in [found.name for found in measured() if not found.passed]


def test_the_page_shows_every_row_and_errors_of_this_size():
    shown = dict(re.findall(r"^\| (\S.*?) +\| .*? +\| (\d\.\de-\d\d|0) +\|$", DOCS.read_text(), flags=re.MULTILINE))
    for found in measured():
        assert found.name in shown
        assert found.error <= 100 * float(shown[found.name]) + 1e-13, found.name
