"""The augmented Lagrangian against scipy, closed forms, and a policy gradient whose constrained optimum is known."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from ddpo import SamplerConfig
from ddpo.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.control.chain import optimum, quadratic, step_kls
from ddpo.control.toy_problem import ToyProblem
from ddpo.lagrangian import Constraint, Multipliers
from ddpo.validation import FieldError


def ascend(objective, means, constraints, start, *, epochs, steps, rate):
    """The method of multipliers: gradient ascent on r +- m s between updates of the multipliers."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    multipliers = Multipliers(constraints)
    for _ in range(epochs):
        for _ in range(steps):
            values = means(x)
            weights = multipliers.weights({name: float(value.detach()) for name, value in values.items()})
            total = objective(x)
            for name, constraint in multipliers.constraints.items():
                total = total + constraint.sign * weights[name] * values[name]
            (gradient,) = torch.autograd.grad(total, x)
            x.data += rate * gradient
        multipliers.update({name: float(value.detach()) for name, value in means(x).items()})
    return x.detach().numpy(), multipliers.values


def test_a_convex_programme_is_solved_as_by_scipy_with_its_multipliers():
    """max -|x - (3, 2)|^2 + x0 x1 / 4 subject to x0 + x1 <= 3, x0^2 <= 2, x1 >= -10 (never active)."""
    constraints = [
        Constraint(reward="sum", at_most=3.0, penalty=2.0),
        Constraint(reward="square", at_most=2.0, penalty=2.0),
        Constraint(reward="free", at_least=-10.0, penalty=2.0, multiplier=1.0),
    ]
    x, multipliers = ascend(
        lambda x: -((x[0] - 3) ** 2) - (x[1] - 2) ** 2 + x[0] * x[1] / 4,
        lambda x: {"sum": x[0] + x[1], "square": x[0] ** 2, "free": x[1]},
        constraints, [0.0, 0.0], epochs=60, steps=100, rate=0.02,
    )  # fmt: skip
    oracle = minimize(
        lambda x: (x[0] - 3) ** 2 + (x[1] - 2) ** 2 - x[0] * x[1] / 4,
        [0.0, 0.0],
        method="SLSQP",
        constraints=[
            {"type": "ineq", "fun": lambda x: 3 - x[0] - x[1]},
            {"type": "ineq", "fun": lambda x: 2 - x[0] ** 2},
            {"type": "ineq", "fun": lambda x: x[1] + 10},
        ],
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(x, oracle.x, atol=1e-5)
    gradient = np.array([-2 * (x[0] - 3) + x[1] / 4, -2 * (x[1] - 2) + x[0] / 4])
    normals = np.array([[1.0, 1.0], [2 * x[0], 0.0]]).T
    np.testing.assert_allclose(
        [multipliers["sum"], multipliers["square"]], np.linalg.solve(normals, gradient), atol=1e-4
    )
    assert multipliers["free"] == 0.0


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
        ({"reward": " ", "at_most": 1.0}, "reward must be a reward's name"),
    ],
)
def test_impossible_constraints_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        Constraint(**fields)
