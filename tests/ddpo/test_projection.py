"""Bounds by the weights of particles: against closed forms on Gaussian particles, and what is refused."""

import math

import pytest
import torch

from ddpo.credit.lagrangian import Constraint
from ddpo.steered import Bounds, steered_samples
from ddpo.steering import BestOfN, FeynmanKacKind, SvddKind
from ddpo.steering.projection import check_bounds, projected, weighted_mean
from ddpo.validation import UserError
from tests.ddpo.tools import make_policy

PARTICLES = 200_000


@pytest.fixture(scope="module")
def normal():
    return torch.randn(2, PARTICLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def error_of_mean(std=1.0, *, tilt=0.0):
    """Four standard errors of the mean of weights exp(tilt x), whose effective number is P exp(-tilt^2)."""
    return 4 * std * math.exp(tilt**2 / 2) / math.sqrt(PARTICLES)


def test_a_bound_on_a_gaussian_takes_the_multiplier_of_the_closed_form(normal):
    """N(0, 1) tilted by exp(.8 x) is N(.8, 1); mean at most .3 is N(.3, 1), lambda = .8 - .3."""
    x = normal[:1]
    found, multipliers = projected(0.8 * x, {"x": x}, [Constraint(reward="x", at_most=0.3)])
    weights = found.softmax(1)
    assert multipliers["x"] == pytest.approx(0.5, abs=error_of_mean(tilt=0.8))
    assert weighted_mean(found, x) == pytest.approx(0.3, abs=1e-6)
    assert float((weights * (x - 0.3).square()).sum()) == pytest.approx(1.0, abs=error_of_mean(2, tilt=0.3))


def test_a_bound_that_is_met_changes_nothing(normal):
    x = normal[:1]
    found, multipliers = projected(0.2 * x, {"x": x}, [Constraint(reward="x", at_most=0.5)])
    assert multipliers == {"x": 0.0} and torch.equal(found, 0.2 * x)


def test_a_bound_on_the_square_takes_the_variance_of_the_closed_form(normal):
    """exp(-lambda x^2) N(0, 1) has the variance 1 / (1 + 2 lambda); at most .5 takes lambda = .5."""
    x = normal[:1]
    found, multipliers = projected(torch.zeros_like(x), {"s": x.square()}, [Constraint(reward="s", at_most=0.5)])
    assert multipliers["s"] == pytest.approx(0.5, abs=0.02)
    assert float((found.softmax(1) * x**4).sum()) == pytest.approx(3 * 0.25, abs=0.02)


def test_two_bounds_on_correlated_scores_meet_the_conditions_of_kuhn_and_tucker(normal):
    """x ~ N(0, I_2): E[x_1] >= .4, E[x_1 + x_2] <= .1 takes the mean (.4, -.3): lambda = (.7, .3)."""
    x, y = normal[:1], normal[1:]
    constraints = [Constraint(reward="first", at_least=0.4), Constraint(reward="both", at_most=0.1)]
    found, multipliers = projected(torch.zeros_like(x), {"first": x, "both": x + y}, constraints)
    assert multipliers["first"] == pytest.approx(0.7, abs=0.02)
    assert multipliers["both"] == pytest.approx(0.3, abs=0.02)
    assert weighted_mean(found, x) == pytest.approx(0.4, abs=1e-4)
    assert weighted_mean(found, y) == pytest.approx(-0.3, abs=1e-4)


def test_one_multiplier_serves_samples_of_different_means():
    """Two samples of particles N(0, 1) and N(2, 1): their mean 1 is at most .2 with both moved by lambda = .8."""
    x = torch.randn(2, PARTICLES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x + torch.tensor([[0.0], [2.0]])
    found, multipliers = projected(torch.zeros_like(x), {"x": x}, [Constraint(reward="x", at_most=0.2)])
    assert multipliers["x"] == pytest.approx(0.8, abs=error_of_mean(tilt=0.8))
    assert (found.softmax(1) * x).sum(1).tolist() == pytest.approx([-0.8, 1.2], abs=error_of_mean(tilt=0.8))


@pytest.mark.parametrize("bound", [{"at_least": 3.5}, {"at_most": -1.0}])
def test_a_bound_beyond_the_best_particles_says_what_they_reach(bound):
    x = torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 3.0]], dtype=torch.float64)
    with pytest.raises(UserError, match=r"the best of every sample's particles have (3|0); take a looser bound"):
        projected(torch.zeros_like(x), {"x": x}, [Constraint(reward="x", **bound)])


def test_bounds_that_exclude_each_other_are_refused():
    x = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    bounds = [Constraint(reward="a", at_least=2.0), Constraint(reward="b", at_most=1.0)]
    with pytest.raises(UserError, match="together"):
        projected(torch.zeros_like(x), {"a": x, "b": x}, bounds)


def test_a_bound_on_what_has_no_score_is_refused():
    with pytest.raises(UserError, match="no score 'x', only red, blue"):
        check_bounds([Constraint(reward="x", at_most=0.5)], ["red", "blue"])
    with pytest.raises(UserError, match="kl needs the policy's own chains"):
        check_bounds([Constraint(reward="kl", at_most=0.5)], ["red"])


def channel(number):
    return lambda images, prompts, metadata: images[:, number].mean((1, 2))


def test_steered_samples_keep_a_bound_in_every_batch_and_keep_their_images():
    policy, prompts = make_policy(), ["a cat", "two dogs", "red house", "a bird"]
    steer = FeynmanKacKind(alpha=1e-3, particles=4, every=2)
    free = steered_samples(policy, prompts, channel(0), steer=steer)
    green = channel(1)

    def bounded(at_least, size):
        bounds = Bounds(
            constraints=[Constraint(reward="green", at_least=at_least)],
            scores=lambda images, prompts, metadata: {"green": green(images, prompts, metadata)},
        )
        return steered_samples(policy, prompts, channel(0), steer=steer, batch_size=size, bounds=bounds)

    loose, one, whole = bounded(-1.0, 16), bounded(0.0, 4), bounded(0.0, 16)
    assert loose.multipliers == {"green": 0.0} and torch.equal(loose.images, free.images)
    assert one.multipliers["green"] == pytest.approx(whole.multipliers["green"], rel=1e-3, abs=1e-6)
    with pytest.raises(UserError, match="cannot be at least 2 in the mean"):
        bounded(2.0, 16)


@pytest.mark.parametrize("steer", [BestOfN(particles=4), SvddKind(), FeynmanKacKind(particles=1)])
def test_steering_without_weights_keeps_no_bounds(steer):
    bounds = Bounds(constraints=[Constraint(reward="x", at_most=0.5)], scores=lambda *of: {})
    with pytest.raises(UserError, match="kept by the weights of particles"):
        steered_samples(make_policy(), ["a cat"], channel(0), steer=steer, bounds=bounds)
