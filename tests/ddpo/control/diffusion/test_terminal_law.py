"""Where samplers end on Gaussian data with the exact denoiser, as steps grow: in the data's law, and how fast."""

import math
from dataclasses import replace

import pytest
import torch

from ddpo.control.diffusion.chain import AffineChain, gaussian_data_chain, marginals
from ddpo.sampling.samplers import FLOW_ONLY, SamplerConfig, make_schedule
from ddpo.sampling.schedule import Grid, Schedule

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)


def schedule_of(kind: str, eta: float, num_steps: int, *, flow: bool, top: float = 1.0) -> Schedule:
    """Equal steps of sigma from `top` to 0 for flow matching, of the angle, (a, s) = (cos, sin), from pi/2 for VP."""
    level = torch.linspace(top, 0, num_steps + 1, dtype=torch.float64)
    a, s = (1 - level, level) if flow else (torch.cos(level * math.pi / 2), torch.sin(level * math.pi / 2))
    grid = Grid(a=a[:-1], s=s[:-1], a_next=a[1:], s_next=s[1:])
    config = SamplerConfig(kind=kind, num_steps=num_steps, eta=eta)  # type: ignore[arg-type]
    return make_schedule(config, grid, model_time=torch.arange(num_steps), is_flow=flow, clip=None)


def chain_of(schedule: Schedule) -> AffineChain:
    """The chain that starts in the law of noisy data, which is N(0, I) only where a = 0."""
    a, s = schedule.a[0], schedule.s[0]
    prior_cov = a**2 * COV + s**2 * torch.eye(2, dtype=torch.float64)
    return replace(gaussian_data_chain(MEAN, COV, schedule), prior_mean=a * MEAN, prior_cov=prior_cov)


def orders(errors: list[float]) -> list[float]:
    return [math.log2(before / after) for before, after in zip(errors[:-1], errors[1:], strict=True)]


@pytest.mark.parametrize(
    ("kind", "eta", "flow", "top"),
    [
        ("ddim", 1.0, False, 1.0),
        ("ddim", 0.5, False, 1.0),
        ("ddpm", 1.0, False, 1.0),
        ("ode", 1.0, False, 1.0),
        ("ode", 1.0, True, 1.0),
        ("dance_sde", 0.3, True, 1.0),
        ("dance_sde", 1.0, True, 1.0),
        ("flow_sde", 0.3, True, 0.95),
        ("flow_sde", 0.7, True, 0.95),
        ("flow_sde", 1.0, True, 0.95),
    ],
)
def test_mean_is_exact_and_covariance_converges_at_first_order(kind: str, eta: float, flow: bool, top: float) -> None:
    errors = []
    for num_steps in (100, 200, 400):
        means, covs = marginals(chain_of(schedule_of(kind, eta, num_steps, flow=flow, top=top)))
        assert float((means[-1] - MEAN).abs().max()) < 1e-12
        errors.append(float((covs[-1] - COV).abs().max()))
    assert errors[-1] < 0.01
    assert all(0.85 < order < 1.15 for order in orders(errors)), (errors, orders(errors))


def terminal_variance(schedule: Schedule, variance: float) -> float:
    """Of the chain on data N(0, variance) from N(0, 1), by the scalar recursion: many steps at once."""
    columns = [
        values.tolist() for values in (schedule.a, schedule.s, schedule.a_next, schedule.direction, schedule.std)
    ]
    spread = 1.0
    for a, s, a_next, direction, std in zip(*columns, strict=True):
        gain = a * variance / (a**2 * variance + s**2)  # E[x0 | x] = gain x
        factor = a_next * gain + direction * (1 - a * gain) / s
        spread = factor**2 * spread + std**2
    return spread


@pytest.mark.parametrize(("eta", "order"), [(0.7, 0.49), (1.0, 0.8)])
def test_flow_sde_from_sigma_one_still_arrives_but_at_order_eta_squared(eta: float, order: float) -> None:
    """Near sigma = 1 its noise per step, eta^2 / k in step k, does not shrink with the step: the variance is off by a
    constant there, and later steps damp that by (k / T)^(eta^2). With eta = 1 a logarithm is left of order 1."""
    errors = [
        abs(terminal_variance(schedule_of("flow_sde", eta, num_steps, flow=True), 0.25) - 0.25)
        for num_steps in (12_800, 25_600, 51_200)
    ]
    assert errors[-1] < 2e-4
    assert all(abs(found - order) < 0.05 for found in orders(errors)), (errors, orders(errors))


@pytest.mark.parametrize(("eta", "least"), [(0.2, 0.005), (0.7, 0.05), (1.0, 0.1)])
def test_cps_loses_variance_however_many_steps(eta: float, least: float) -> None:
    """Its noise per step, s' sin(eta pi/2), does not shrink with the step, and x0_hat has less variance than x0."""
    lost = [0.25 - terminal_variance(schedule_of("cps", eta, n, flow=True), 0.25) for n in (3200, 6400)]
    assert lost[1] > least
    assert lost[0] / lost[1] < 1.05


@pytest.mark.parametrize("kind", FLOW_ONLY)
def test_a_window_of_noise_keeps_the_terminal_law_as_steps_grow(kind: str) -> None:
    """Four noisy steps among ODE steps: their share of the trajectory shrinks, for CPS as well."""
    from ddpo.sampling.samplers import epoch_schedule
    from ddpo.sampling.step_selection import StepSelection

    selection = StepSelection(kind="window", start=10, shift_every_epochs=0)
    errors = []
    for num_steps in (50, 100, 200, 400):
        noisy, ode = (schedule_of(name, 0.7, num_steps, flow=True) for name in (kind, "ode"))
        schedule = epoch_schedule(noisy, ode, selection, epoch=0, seed=0)
        assert len(schedule.stochastic_steps) == 4
        errors.append(float((marginals(chain_of(schedule))[1][-1] - COV).abs().max()))
    assert all(order > 0.7 for order in orders(errors)), (errors, orders(errors))
