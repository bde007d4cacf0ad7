"""The augmented Lagrangian against scipy, closed forms, and a policy gradient whose constrained optimum is known."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from ddpo import SamplerConfig
from ddpo.control.diffusion.chain import optimum, quadratic, step_kls
from ddpo.control.diffusion.toy_problem import ToyProblem
from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.credit.lagrangian import Constraint, Multipliers
from ddpo.validation import FieldError


def ascend(constraints, *, epochs, steps, rate):
    """Gradient ascent on f +- m s of the programme below, from 0, between updates of what the constraints carry.

    The step falls as 1 / (1 + k / 200) within an epoch, so that a penalty without slope is met as well.
    """
    x, multipliers = np.zeros(2), Multipliers(constraints)
    for _ in range(epochs):
        for k in range(steps):
            weights = multipliers.weights(means(x))
            gradient = np.array([-2 * (x[0] - 3) + x[1] / 4, -2 * (x[1] - 2) + x[0] / 4])
            gradient -= weights["sum"] + weights["square"] * np.array([2 * x[0], 0.0])
            gradient[1] += weights["free"]
            x = x + rate / (1 + k / 200) * gradient
        multipliers.update(means(x))
    return x, multipliers


def means(x):
    return {"sum": float(x[0] + x[1]), "square": float(x[0] ** 2), "free": float(x[1])}


def programme(**options):
    """max -|x - (3, 2)|^2 + x0 x1 / 4 subject to x0 + x1 <= 3, x0^2 <= 2, x1 >= -10 (never active)."""
    return [
        Constraint(reward="sum", at_most=3.0, **options),
        Constraint(reward="square", at_most=2.0, **options),
        Constraint(reward="free", at_least=-10.0, **options),
    ]


def by_scipy():
    """Its solution, and the multipliers of the two active constraints."""
    found = minimize(
        lambda x: (x[0] - 3) ** 2 + (x[1] - 2) ** 2 - x[0] * x[1] / 4,
        [0.0, 0.0],
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x: 3 - x[0] - x[1]},
            {"type": "ineq", "fun": lambda x: 2 - x[0] ** 2},
            {"type": "ineq", "fun": lambda x: x[1] + 10},
        ],
        options={"ftol": 1e-14},
    ).x
    gradient = np.array([-2 * (found[0] - 3) + found[1] / 4, -2 * (found[1] - 2) + found[0] / 4])
    normals = np.array([[1.0, 1.0], [2 * found[0], 0.0]]).T
    return found, np.linalg.solve(normals, gradient)


def test_a_convex_programme_is_solved_as_by_scipy_with_its_multipliers():
    constraints = [*programme(penalty=2.0)[:2], Constraint(reward="free", at_least=-10.0, penalty=2.0, multiplier=1.0)]
    x, multipliers = ascend(constraints, epochs=60, steps=100, rate=0.03)
    solution, exact = by_scipy()
    np.testing.assert_allclose(x, solution, atol=1e-5)
    np.testing.assert_allclose([multipliers.values[name] for name in ("sum", "square")], exact, atol=1e-4)
    assert multipliers.values["free"] == 0.0


def test_an_exact_penalty_above_the_multipliers_has_scipys_solution_and_one_below_does_not():
    solution, exact = by_scipy()
    for penalty, solved in ((1.5 * exact.max(), True), (0.5 * exact.max(), False)):
        x, _ = ascend(programme(method="exact", penalty=penalty), epochs=1, steps=6_000, rate=0.02)
        assert (np.abs(x - solution).max() < 5e-3) == solved
    grown, multipliers = ascend(programme(method="exact", penalty=0.1, rate=1.0), epochs=60, steps=60, rate=0.01)
    np.testing.assert_allclose(grown, solution, atol=0.05)
    assert min(multipliers.values["sum"], multipliers.values["square"]) > 0.8 * exact.min()


def test_a_barrier_comes_from_inside_and_its_weights_tend_to_scipys_multipliers():
    solution, exact = by_scipy()
    constraints = programme(method="barrier", penalty=0.5, rate=0.1, margin=0.005)
    x, multipliers = ascend(constraints, epochs=35, steps=80, rate=3e-3)
    held = means(x)
    assert held["sum"] < 3 and held["square"] < 2
    np.testing.assert_allclose(x, solution, atol=0.02)
    weights = multipliers.weights(held)  # t has fallen once since x came to rest
    np.testing.assert_allclose([weights["sum"] / 0.9, weights["square"] / 0.9], exact, rtol=0.02)
    assert multipliers.values["sum"] == pytest.approx(0.5 * 0.9**35)


def test_weights_of_a_penalty_are_the_gradients_of_their_functions():
    def of_barrier(c):
        parabola = 0.5 * (2 * c / 0.1 + (c / 0.1) ** 2 / 2)
        return torch.where(c < -0.1, -0.5 * torch.log(-c.clamp(max=-0.1)), parabola)

    cases = (
        ({"method": "exact", "penalty": 3.0}, lambda c: 3 * c.clamp(min=0)),
        ({"method": "barrier", "penalty": 0.5, "margin": 0.1}, of_barrier),
    )
    for options, price in cases:
        multipliers = Multipliers([Constraint(reward="s", at_least=0.6, **options)])
        for mean in (0.1, 0.55, 0.65, 0.9):
            s = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(-price(0.6 - s), s)
            assert multipliers.weights({"s": mean})["s"] == pytest.approx(float(slope), abs=1e-12)


def test_a_samples_weight_is_that_of_the_others_mean_so_that_the_gradient_has_no_bias():
    """x ~ N(theta, 1), s = x^2 <= -5 in groups of 4, theta = 1: E[m s score] is E[m] d/d theta E[s]."""
    multipliers = Multipliers([Constraint(reward="s", at_most=-5.0, penalty=1.0)])
    x = 1 + torch.randn(3_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, score = x.square(), x - 1
    own = torch.stack([multipliers.weights_of_samples("s", group) for group in s])
    others = (s.sum(1, keepdim=True) - s) / 3
    torch.testing.assert_close(own, 5 + others)
    unbiased, biased = ((weight * s * score).mean(1) for weight in (own, 5 + s.mean(1, keepdim=True)))
    exact = (5 + 2) * 2  # E[m] of the mean 2, times d/d theta (theta^2 + 1)
    assert abs(float(unbiased.mean()) - exact) < 4.5 * float(unbiased.std()) / 3_000**0.5
    assert float(biased.mean()) - exact > 4.5 * float(biased.std()) / 3_000**0.5


def test_the_weights_are_the_gradient_of_powell_hestenes_and_rockafellars_function():
    constraint = Constraint(reward="s", at_least=0.6, penalty=3.0, multiplier=0.5)
    multipliers = Multipliers([constraint])
    for mean in (0.1, 0.5, 0.7, 0.9):
        s = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        phr = -((0.5 + 3.0 * (0.6 - s)).clamp(min=0) ** 2 - 0.5**2) / (2 * 3.0)
        (slope,) = torch.autograd.grad(phr, s)
        assert multipliers.weights({"s": mean})["s"] * constraint.sign == pytest.approx(float(slope), abs=1e-12)


def test_a_policy_gradient_on_noisy_means_finds_the_constrained_optimum_and_its_multiplier():
    """x ~ N(theta, 1), max E[-(x - 2)^2] subject to E[x] <= 1: theta = 1 with multiplier 2 (2 - 1) = 2."""
    generator = torch.Generator().manual_seed(0)
    multipliers = Multipliers([Constraint(reward="x", at_most=1.0, penalty=1.0, rate=0.1)])
    estimator = AdvantageEstimator(AdvantageConfig(baseline="batch", scale="none", clip=None))
    theta, size, tail = 0.0, 512, []
    for epoch in range(600):
        x = theta + torch.randn(size, generator=generator, dtype=torch.float64)
        means = {"x": float(x.mean())}
        scores = -((x - 2) ** 2) - multipliers.weights(means)["x"] * x
        groups = torch.zeros(size, dtype=torch.int64)
        advantages = estimator(scores, groups, [""] * size, kl=None, alpha=0.0, num_steps=1).values[:, 0]
        theta += 0.05 * float((advantages.double() * (x - theta)).mean())
        multipliers.update(means)
        if epoch >= 200:
            tail.append((theta, multipliers.values["x"]))
    np.testing.assert_allclose(np.mean(tail, axis=0), [1.0, 2.0], atol=0.03)


def test_the_multiplier_of_a_bound_on_the_path_kl_is_the_alpha_that_attains_it():
    """Denoising Gaussian data: the best policy and its path KL are known for every alpha."""
    sampler = SamplerConfig(kind="ddim", num_steps=4, eta=1.0, guidance_scale=1.0)
    one = torch.ones(1, dtype=torch.float64)
    problem = ToyProblem(
        mean=0.2 * one, cov=one[None], reward=quadratic(torch.zeros(1, 1, dtype=torch.float64), one), alpha=1.0,
        sampler=sampler,
    )  # fmt: skip

    def path_kl(alpha):
        return float(step_kls(optimum(problem.reference, problem.reward, alpha).chain, problem.reference).sum())

    target = path_kl(0.7)
    exact = brentq(lambda alpha: path_kl(alpha) - target, 0.2, 5.0, xtol=1e-12)
    multipliers = Multipliers([Constraint(reward="kl", at_most=target, penalty=0.0, rate=0.3, multiplier=2.0)])
    for _ in range(300):
        multipliers.update({"kl": path_kl(multipliers.values["kl"])})
    assert multipliers.values["kl"] == pytest.approx(exact, abs=1e-8)
    assert multipliers.weights({"kl": target})["kl"] == pytest.approx(0.7, abs=1e-8)


def test_a_constraint_that_holds_loses_its_multiplier_and_pushes_no_more():
    multipliers = Multipliers([Constraint(reward="s", at_least=0.5, penalty=1.0, multiplier=0.2)])
    assert multipliers.weights({"s": 0.9})["s"] == 0.0
    multipliers.update({"s": 0.9})
    assert multipliers.values["s"] == 0.0


def test_multipliers_survive_json_and_refuse_those_of_other_constraints():
    one = Multipliers([Constraint(reward="s", at_least=0.5, rate=0.1)])
    one.update({"s": 0.123456789})
    two = Multipliers([Constraint(reward="s", at_least=0.5, rate=0.1)])
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.values == one.values
    with pytest.raises(ValueError, match="multipliers are of s, this run's constraints of t"):
        Multipliers([Constraint(reward="t", at_least=0.5)]).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": "s"}, "at_least must be given"),
        ({"reward": "s", "at_least": 1.0, "at_most": 2.0}, "and not both"),
        ({"reward": "s", "at_most": float("nan")}, "at_most must be finite"),
        ({"reward": "s", "at_most": 1.0, "penalty": -1.0}, "penalty must be at least 0"),
        ({"reward": "s", "at_most": 1.0, "penalty": 0.0}, "penalty must be positive when rate is 0 or null"),
        ({"reward": "kl", "at_least": 1.0}, "at_most must be given for kl"),
        ({"reward": "s", "at_most": 1.0, "method": "barrier"}, "margin must be positive with barrier"),
        ({"reward": "s", "at_most": 1.0, "margin": 0.1}, "margin must be positive with barrier, and null"),
        ({"reward": "s", "at_most": 1.0, "method": "exact", "penalty": 0.0, "rate": 1.0}, "penalty must be positive"),
        ({"reward": "s", "at_most": 1.0, "method": "exact", "multiplier": 1.0}, "multiplier must be 0 with exact"),
        ({"reward": "s", "at_most": 1.0, "method": "barrier", "margin": 0.1, "rate": 1.0}, "rate must be below 1"),
        ({"reward": " ", "at_most": 1.0}, "reward must be a reward's name"),
    ],
)
def test_impossible_constraints_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        Constraint(**fields)
