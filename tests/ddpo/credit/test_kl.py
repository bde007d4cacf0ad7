"""The controller of the KL weight."""

import itertools
import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpo.control.checks.kl_response import TARGET, check_step_response, controller, peaks, small_problem
from ddpo.control.diffusion.kl_response import respond
from ddpo.control.problems.kl_plants import SHAPES, Plant, family, kl_over_target
from ddpo.credit.kl import AdaptiveKL, FixedKL, first_alpha
from ddpo.credit.kl_course import KLCourse, levels_off, next_alpha
from ddpo.validation import FieldError
from scripts.plot_kl_response import integrator


@given(st.floats(0, 100), st.floats(0, 1e6), st.floats(1e-3, 10))
def test_a_fixed_weight_stays(alpha, path_kl, current):
    assert next_alpha(FixedKL(alpha=alpha), current, path_kl, course=KLCourse())[0] == alpha


def courses(config, alpha, kls, course=None):
    """The weights of a run of these KLs, and the course after it."""
    course, alphas = course or KLCourse(), []
    for path_kl in kls:
        alpha, course = next_alpha(config, alpha, path_kl, course=course)
        alphas.append(alpha)
    return alphas, course


@pytest.mark.parametrize("power", [1, 2])
def test_a_kl_that_rises_at_full_speed_does_not_move_the_weight(power):
    """As t or t^2, over a thousand epochs, to .6 of its target."""
    rise = [0.6 * (epoch / 1000) ** power for epoch in range(1001)]
    alphas, course = courses(AdaptiveKL(target=1.0), 0.3, rise)
    assert set(alphas) == {0.3} and course.pace is None


def test_a_rise_that_slows_down_is_extrapolated_to_where_it_ends():
    """1 - q^n: means of thirds are geometric as well, and their limit is 1."""
    values = tuple(1 - 0.8**n for n in range(12))
    assert levels_off(values) == pytest.approx(1.0)
    assert levels_off(tuple(float(n) for n in range(12))) is None
    assert levels_off((0.5,) * 12) == pytest.approx(0.5)
    assert levels_off((0.5,) * 8 + (0.4,) * 4) == pytest.approx(0.4)


def test_a_level_short_of_the_target_is_raised_by_the_slope_that_the_last_step_had():
    """Level = alpha^-2: the first step takes slope 4 from .09 at weight 10/3, the second the slope, 2, and .8 of it."""
    config, alpha, course = AdaptiveKL(target=1.0), 10 / 3, KLCourse()
    seen = [alpha]
    while len(seen) < 3:
        level = alpha**-2
        for n in range(9):
            alpha, course = next_alpha(config, alpha, level * (1 - 0.2**n), course=course)
        if alpha != seen[-1]:
            seen.append(alpha)
    first, second = (math.log(b / a) for a, b in itertools.pairwise(seen))
    assert first == pytest.approx(math.log(0.09) / 4, rel=0.01)
    assert second == pytest.approx(0.8 * math.log(seen[1] ** -2) / 2, rel=0.02)


@pytest.mark.parametrize(("pace", "proportional", "integral"), [(12, 0.15, 0.03), (100, 1.0, 0.03), (1000, 2.0, 0.008)])
def test_a_kl_above_its_target_is_held_by_a_proportional_and_an_integral_term(pace, proportional, integral):
    course = KLCourse(epochs=pace, pace=pace, error=0.0)
    alpha, after = next_alpha(AdaptiveKL(target=2.0), 0.4, 2 * math.exp(0.5), course=course)
    moved = 0.5 / min(10, max(1, pace / 10))
    assert math.log(alpha / 0.4) == pytest.approx(proportional * moved + integral * moved)
    assert after.error == pytest.approx(moved)


def test_an_adaptive_weight_stays_inside_its_bounds():
    config = AdaptiveKL(target=1.0, rate=5.0, alpha=0.1, min_alpha=0.05, max_alpha=0.2)
    assert courses(config, 0.1, [10.0, 100.0])[0][-1] == 0.2
    assert courses(config, 0.1, [0.0] * 40)[0][-1] == 0.05
    assert first_alpha(AdaptiveKL(target=1.0, max_alpha=0.2), 100.0) == 0.2


def test_the_first_weight_is_what_a_nat_is_worth_to_gaussians_at_the_target():
    """Linear reward s x of x ~ N(0, 1): the tilted law N(s/alpha, 1) has KL s^2 / (2 alpha^2)."""
    config = AdaptiveKL(target=3.0)
    alpha = first_alpha(config, 0.7)
    assert 0.7**2 / (2 * alpha**2) == pytest.approx(3.0)
    assert first_alpha(AdaptiveKL(target=3.0, alpha=0.2), 0.7) == 0.2
    assert first_alpha(FixedKL(alpha=0.5), 0.7) == 0.5


def test_the_kl_meets_its_target_without_overshoot_at_three_learning_rates():
    for found in check_step_response():
        assert found.passed, found


def test_no_plant_exceeds_its_target_by_half():
    """Every law, with and without delay and momentum, measured within +- 20%; `ddpo verify --full` has more."""
    plants = family(excesses=(1, 100), speeds=(0.01, 0.03, 0.3), noises=(0.2,))
    found = peaks(plants, AdaptiveKL(target=1.0, alpha=1.0))
    assert len(found) == 120
    assert min(found.values()) > 0.9  # they have come up
    assert max(found.values()) < 1.5


def test_the_weight_comes_down_from_a_hundred_times_too_much():
    for law, power, slope in SHAPES:
        plant = Plant(
            law=law, power=power, slope=slope, excess=100.0, speed=0.2, delay=0, momentum=0, noise=0.0
        )  # fmt: skip
        found = kl_over_target(plant, controller(AdaptiveKL(target=1.0)), seed=0, epochs=200)
        assert all(0.8 < kl < 1.25 for kl in found[-20:]), (law, found[-20:])


def test_an_integrator_alone_overshoots_severalfold_and_does_not_settle():
    """On the chain from a weight of .01, and on slow plants from one that is right: what the checks tell apart."""
    for rate in (0.1, 0.3):
        found = respond(small_problem(), integrator(rate), start=0.01, learning_rate=0.01, epochs=70)
        assert found.overshoot(TARGET) > 3
        assert found.settled(TARGET) > 50
    slow = Plant(law="limited", power=2, slope=2, excess=1.0, speed=0.01, delay=0, momentum=0, noise=0.0)
    assert max(kl_over_target(slow, integrator(0.1, target=1.0), seed=0)) > 3


def test_a_course_survives_json():
    _, course = courses(AdaptiveKL(target=1.0), 0.3, [0.1 * (1 - 0.5**n) for n in range(20)])
    assert course.tried is not None and course.rise
    assert KLCourse.from_values(json.loads(json.dumps(asdict(course)))) == course
    assert KLCourse.from_values({}) == KLCourse()


@pytest.mark.parametrize("path_kl", [math.nan, math.inf])
def test_an_adaptive_weight_refuses_a_kl_that_is_not_finite(path_kl):
    with pytest.raises(ValueError, match=f"cannot follow a path KL of {path_kl} nats"):
        next_alpha(AdaptiveKL(target=1.0), 0.01, path_kl, course=KLCourse())


def test_the_controller_finds_the_weight_whose_optimum_meets_the_target():
    """KL of the optimum falls as 1/alpha^2 here (linear reward, Gaussian reference): target 4 needs alpha = 0.5."""
    config, alpha, course = AdaptiveKL(target=4.0, alpha=10.0), 10.0, KLCourse()
    for _ in range(300):
        alpha, course = next_alpha(config, alpha, 1 / alpha**2, course=course)
    assert math.isclose(alpha, 0.5, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: FixedKL(alpha=-1.0), "alpha"),
        (lambda: AdaptiveKL(target=0.0), "target"),
        (lambda: AdaptiveKL(target=1.0, rate=0.0), "rate"),
        (lambda: AdaptiveKL(target=1.0, damping=-1.0), "damping"),
        (lambda: AdaptiveKL(target=1.0, min_alpha=2.0, max_alpha=1.0), "min_alpha"),
        (lambda: AdaptiveKL(target=1.0, alpha=1e9), "alpha"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_field(build, field):
    with pytest.raises(FieldError, match=f"^{field} must be"):
        build()
