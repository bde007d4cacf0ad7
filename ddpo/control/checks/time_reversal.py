"""Diffusion as control: time reversal, its verification identity, and Girsanov's path KL."""

from collections.abc import Iterator

import torch

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.girsanov import PathKL, affine_path_kl, path_kl
from ddpo.control.diffusion.score_matching import kolmogorov_distance
from ddpo.control.diffusion.time_reversal import VESDE, VPSDE, TimeReversal, perturbed_controls, verify
from ddpo.control.problems.mixture import gaussian_mixture

_LINE = gaussian_mixture([0.3, 0.7], [[-1.5], [1.0]], [0.4, 0.6])
_PLANE = gaussian_mixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6])


def _reversal() -> Iterator[Measurement]:
    problem = TimeReversal(data=_LINE, sde=VPSDE())
    end = verify(
        problem, problem.optimal_control, num_steps=100, num_paths=4000, generator=_seeded(0), scheme="heun"
    ).terminal
    distance = kolmogorov_distance(end, _LINE)
    yield Measurement(
        name="u* generates the data: KS distance of 4,000 samples",
        exact=0.0,
        obtained=distance,
        error=distance,
        tolerance=0.03,
    )
    right = float((end > 0).double().mean())
    exact = 1 - float(_LINE.cdf(torch.zeros(1, dtype=torch.float64)))
    yield Measurement(
        name="weight of the right mode", exact=exact, obtained=right, error=abs(right - exact), tolerance=0.03
    )


def _identity() -> Iterator[Measurement]:
    for name, data, sde in (("1-D, VP", _LINE, VPSDE()), ("2-D, VE", _PLANE, VESDE(sigma_min=0.05, sigma_max=8.0))):
        problem = TimeReversal(data=data, sde=sde)
        controls = perturbed_controls(problem)
        for label in ("1.2 u*", "u* + sin(2 x + 3 t)"):
            result = verify(
                problem, controls[label], num_steps=100, num_paths=4000, generator=_seeded(1), scheme="heun"
            )
            yield Measurement(
                name=f"J(u) = V + gap, {name}, u = {label}",
                exact=result.value_plus_gap,
                obtained=result.value_plus_gap + result.bias,
                error=abs(result.bias),
                tolerance=0.06,
            )


def _order() -> Iterator[Measurement]:
    problem = TimeReversal(data=_LINE, sde=VPSDE())
    biases = [
        verify(problem, problem.optimal_control, num_steps=n, num_paths=6000, generator=_seeded(2)).bias
        for n in (50, 100, 200)
    ]
    for steps, coarse, fine in ((50, biases[0], biases[1]), (100, biases[1], biases[2])):
        yield Measurement(
            name=f"bias at {steps} steps / at {2 * steps}",
            exact=2.0,
            obtained=coarse / fine,
            error=abs(coarse / fine - 2),
            tolerance=0.6,
        )


def _girsanov() -> Iterator[Measurement]:
    result, exact = _affine_example()
    for name, obtained, tolerance in (
        ("E int |u|^2 / 2", result.integral, 4 * result.standard_error + 0.01 * exact),
        ("sum of per-step KL", result.step_sum, 4 * result.standard_error + 0.01 * exact),
        ("E log dP^u / dP", result.log_ratio, 4 * result.log_ratio_standard_error + 0.01 * exact),
    ):
        yield Measurement(
            name=f"{name}, nats", exact=exact, obtained=obtained, error=abs(obtained - exact), tolerance=tolerance
        )


def _affine_example() -> tuple[PathKL, float]:
    def double(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    A, sigma, K = (
        double([[-1.0, 0.3], [0.0, -0.5]]),
        double([[1.0, 0.0], [0.4, 0.7]]),
        double([[0.5, -0.2], [0.1, 0.3]]),
    )
    k, start = double([[0.4, -0.6]])[0], double([[1.0, 1.0]])
    result = path_kl(
        lambda x, t: x @ K.T + k,
        lambda x, t: x @ A.T,
        sigma,
        start.expand(20_000, -1),
        horizon=1.0,
        num_steps=200,
        generator=_seeded(3),
    )
    return result, affine_path_kl(A, sigma, K, k, mean=start[0], cov=double([[0.0, 0.0]] * 2), horizon=1.0)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CHECKS: tuple[Check, ...] = (
    Check(
        name="time reversal",
        group="diffusion",
        claim="The control Sigma^T grad log p_{T-t} turns noise into the data's law.",
        level="fast",
        run=_reversal,
    ),
    Check(
        name="verification identity",
        group="diffusion",
        claim="A control's cost, its mean-zero part taken off, exceeds the value by half its squared distance from u*.",
        level="fast",
        run=_identity,
    ),
    Check(
        name="Euler order",
        group="diffusion",
        claim="What Euler-Maruyama leaves of the identity halves with the step.",
        level="fast",
        run=_order,
    ),
    Check(
        name="Girsanov",
        group="diffusion",
        claim="The path KL is E int |u|^2 / 2 and the sum of the steps' Gaussian KL divergences.",
        level="fast",
        run=_girsanov,
    ),
)
