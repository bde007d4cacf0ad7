import pytest
import torch

from ddpo.control.problems.lqr import StochasticLQR
from ddpo.control.problems.merton import Merton
from ddpo.control.problems.problem import ControlProblem
from ddpo.control.solvers.generator import (
    derivatives,
    deterministic_hjb_residual,
    finite_horizon_residual,
    generator,
    hamiltonian,
    hjb_residual,
)
from ddpo.control.solvers.improvement import maximise_hamiltonian
from ddpo.control.solvers.networks import QuadraticMLP

F64 = torch.float64


class Bent(ControlProblem):
    """Drift and noise that are nonlinear in state and action; three states, two actions, four noises."""

    state_dim, action_dim, noise_dim, discount = 3, 2, 4, 0.2

    def drift(self, x, a, t=0.0):
        return torch.sin(x) + torch.cat([a, a[:, :1] * a[:, 1:]], 1)

    def diffusion(self, x, a, t=0.0):
        base = torch.arange(12, dtype=x.dtype).view(1, 3, 4) / 10
        return base * (1 + x[:, :, None] ** 2) * torch.cos(a).prod(1)[:, None, None]

    def reward(self, x, a, t=0.0):
        return -(x**2).sum(1) - (a**2).sum(1)


def setup(count=16):
    rng = torch.Generator().manual_seed(0)
    x, a = torch.randn(count, 3, generator=rng, dtype=F64), torch.randn(count, 2, generator=rng, dtype=F64)
    value = QuadraticMLP(3, generator=rng)
    with torch.no_grad():
        for parameter in value.parameters():
            parameter.normal_(0, 0.5, generator=rng)
    return value, x, a


def by_functorch(value, problem, x, a):
    gradient = torch.func.vmap(torch.func.grad(lambda y: value(y[None])[0]))(x)
    hessian = torch.func.vmap(torch.func.hessian(lambda y: value(y[None])[0]))(x)
    sigma = problem.diffusion(x, a)
    return (gradient * problem.drift(x, a)).sum(1) + 0.5 * torch.einsum("bij,biw,bjw->b", hessian, sigma, sigma)


def newton(problem):
    def maximiser(x, gradient, hessian):
        return maximise_hamiltonian(problem, x, gradient, hessian, x.new_zeros(len(x), problem.action_dim))

    return maximiser


def test_generator_agrees_with_functorch_and_not_without_the_half():
    value, x, a = setup()
    expected = by_functorch(value, Bent(), x, a).detach()
    obtained = generator(value, Bent(), x, a)
    torch.testing.assert_close(obtained.detach(), expected, rtol=1e-10, atol=1e-12)
    drift = (derivatives(value, x).gradient * Bent().drift(x, a)).sum(1)
    assert (drift + 2 * (obtained.detach() - drift) - expected).abs().max() > 0.1


def test_generator_is_the_short_time_change_of_the_mean():
    value, x, a = setup(4)
    problem, h = Bent(), 1e-4
    sigma, moved = problem.diffusion(x, a), x + problem.drift(x, a) * h
    mean = torch.zeros(4, dtype=F64)
    for column in sigma.unbind(-1):
        for sign in (1, -1):
            mean += value(moved + sign * (4 * h) ** 0.5 * column).detach() / 8
    change = (mean - value(x).detach()) / h
    torch.testing.assert_close(change, generator(value, problem, x, a).detach(), rtol=2e-2, atol=2e-2)


def test_derivative_in_the_action_agrees_with_finite_differences():
    value, x, a = setup(5)
    a.requires_grad_()
    (slope,) = torch.autograd.grad(generator(value, Bent(), x, a).sum(), a)
    h = 1e-5
    for i in range(2):
        shift = torch.zeros(2, dtype=F64)
        shift[i] = h
        difference = by_functorch(value, Bent(), x, a + shift) - by_functorch(value, Bent(), x, a - shift)
        torch.testing.assert_close(slope[:, i], difference.detach() / (2 * h), rtol=1e-6, atol=1e-6)


def test_derivative_in_the_parameters_agrees_with_functorch():
    value, x, a = setup()
    parameters = list(value.parameters())
    obtained = torch.autograd.grad(generator(value, Bent(), x, a).square().sum(), parameters, materialize_grads=True)
    expected = torch.autograd.grad(by_functorch(value, Bent(), x, a).square().sum(), parameters, materialize_grads=True)
    for one, other in zip(obtained, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_hutchinson_is_unbiased_and_noisy():
    value, x, a = setup(8)
    exact = generator(value, Bent(), x, a).detach()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        draws = torch.stack(
            [generator(value, Bent(), x, a, hessian="hutchinson", generator=rng, num_probes=2) for _ in range(500)]
        )
    z = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4
    assert draws.std(0).min() > 0
    assert not draws.requires_grad


@pytest.mark.parametrize("root", [0.2659750769140807, -0.37597507691408064])
def test_both_riccati_roots_have_residual_zero(root):
    problem = StochasticLQR.example()
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]

    def value(y, root=root):
        return -0.5 * root * y[:, 0] ** 2 - 0.45 * root

    assert hjb_residual(value, problem, x, newton(problem)).abs().max() < 1e-13
    assert hjb_residual(lambda y: value(y, 1.1 * root), problem, x, newton(problem)).abs().max() > 1e-2


def test_mertons_value_has_residual_zero():
    problem = Merton()
    x = torch.linspace(0.3, 3, 9, dtype=F64)[:, None]

    def maximiser(states, gradient, hessian):
        start = states.new_tensor([0.3, 0.03]).expand(len(states), 2)
        return maximise_hamiltonian(problem, states, gradient, hessian, start)

    at = derivatives(problem.value, x)
    best = maximiser(x, at.gradient, at.hessian)
    torch.testing.assert_close(best, problem.optimal_action(x), rtol=1e-6, atol=0)
    residual = hjb_residual(problem.value, problem, x, maximiser) / problem.value(x)
    assert residual.abs().max() < 1e-12


def test_newton_finds_the_maximum_of_a_hamiltonian_that_is_not_quadratic():
    problem = Bent()
    rng = torch.Generator().manual_seed(2)
    x = 0.3 * torch.randn(8, 3, generator=rng, dtype=F64)
    gradient, hessian = -0.2 * x, -0.1 * torch.eye(3, dtype=F64).expand(8, 3, 3)
    best = maximise_hamiltonian(problem, x, gradient, hessian, torch.zeros(8, 2, dtype=F64))
    reached = hamiltonian(problem, x, best, gradient, hessian)
    for _ in range(50):
        other = best + 0.3 * torch.randn(best.shape, generator=rng, dtype=F64)
        assert (hamiltonian(problem, x, other, gradient, hessian) <= reached + 1e-12).all()


def test_hamiltonian_without_a_maximum_is_refused():
    class Reckless(Bent):
        def reward(self, x, a, t=0.0):
            return (a**2).sum(1)

    x = torch.zeros(2, 3, dtype=F64)
    with pytest.raises(ValueError, match="not strictly concave"):
        maximise_hamiltonian(Reckless(), x, x, torch.zeros(2, 3, 3, dtype=F64), torch.zeros(2, 2, dtype=F64))


class Steered(ControlProblem):
    """dx = a dt with reward -a^2 / 2 and g = -x^2 / 2 at T = 1: V = -x^2 / (2 (1 + T - t))."""

    state_dim, action_dim, noise_dim, discount, horizon = 1, 1, 1, 0.0, 1.0

    def __init__(self, noise=0.0):
        self.noise = noise

    def drift(self, x, a, t=0.0):
        return a

    def diffusion(self, x, a, t=0.0):
        return self.noise * torch.ones_like(x)[:, :, None]

    def reward(self, x, a, t=0.0):
        return -0.5 * a.squeeze(1) ** 2

    def terminal_reward(self, x):
        return -0.5 * x.squeeze(1) ** 2


def test_deterministic_hjb_holds_for_the_closed_form_and_refuses_noise():
    x, t = torch.linspace(-2, 2, 9, dtype=F64)[:, None], torch.linspace(0, 0.9, 9, dtype=F64)

    def value(y, s):
        return -0.5 * y[:, 0] ** 2 / (2 - s)

    residual = deterministic_hjb_residual(value, Steered(), x, t, newton(Steered()))
    assert residual.abs().max() < 1e-14
    late = deterministic_hjb_residual(lambda y, s: value(y, s) * (1 + s), Steered(), x, t, newton(Steered()))
    assert late.abs().max() > 0.1
    with pytest.raises(ValueError, match="has noise"):
        deterministic_hjb_residual(value, Steered(0.5), x, t, newton(Steered()))


def test_finite_horizon_hjb_holds_for_the_closed_form_with_noise():
    x, t = torch.linspace(-2, 2, 9, dtype=F64)[:, None], torch.linspace(0, 0.9, 9, dtype=F64)

    def value(y, s):
        return -0.5 * y[:, 0] ** 2 / (2 - s) - 0.5 * 0.25 * torch.log(2 - s)

    problem = Steered(0.5)
    assert finite_horizon_residual(value, problem, x, t, newton(problem)).abs().max() < 1e-14
    quiet = finite_horizon_residual(value, Steered(), x, t, newton(Steered()))
    assert quiet.abs().max() > 0.05


def test_values_without_curvature_or_slope_have_generators():
    _, x, a = setup(4)
    torch.testing.assert_close(generator(lambda y: y.sum(1), Bent(), x, a), Bent().drift(x, a).sum(1))
    assert generator(lambda y: y.new_ones(len(y)), Bent(), x, a).abs().max() == 0


def test_unknown_options_are_refused():
    value, x, a = setup(2)
    with pytest.raises(ValueError, match="hutchinson"):
        generator(value, Bent(), x, a, hessian="approximate")
    with pytest.raises(ValueError, match="num_probes"):
        generator(value, Bent(), x, a, num_probes=0)
