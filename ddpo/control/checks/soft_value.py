"""The soft value v = -alpha log E exp(r / alpha), its control and its HJB equation, at alpha = 1/2, 1 and 2."""

from collections.abc import Iterator

import torch

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import quadratic
from ddpo.control.diffusion.soft_value import ExactSoftValue, SoftValue, hjb_residual, soft_value

_ALPHAS = (0.5, 1.0, 2.0)
_Z = 4.0


def _problem(alpha: float) -> ExactSoftValue:
    return ExactSoftValue(
        A=torch.tensor([[-1.0, 0.3], [0.0, -0.5]], dtype=torch.float64),
        offset=torch.tensor([0.4, -0.6], dtype=torch.float64),
        sigma=torch.tensor([[1.0, 0.0], [0.4, 0.7]], dtype=torch.float64),
        reward=quadratic(torch.tensor([[1.0, 0.2], [0.2, 0.5]]), torch.tensor([0.3, -0.4])),
        alpha=alpha,
        horizon=1.0,
    )


_STATE = torch.tensor([[1.5, 1.0]], dtype=torch.float64)
_NOW = torch.tensor(0.0, dtype=torch.float64)


def _estimate(problem: ExactSoftValue) -> SoftValue:
    return soft_value(
        _STATE,
        problem.drift,
        problem.sigma,
        problem.reward,
        alpha=problem.alpha,
        horizon=problem.horizon,
        num_steps=20,
        num_paths=40_000,
        generator=torch.Generator().manual_seed(0),
        with_control=True,
    )


def _values() -> Iterator[Measurement]:
    for alpha in _ALPHAS:
        problem = _problem(alpha)
        estimate, exact = _estimate(problem), float(problem.value(_STATE, _NOW))
        error, sigma = abs(float(estimate.value) - exact), float(estimate.standard_error)
        yield Measurement(
            name=f"v at alpha {alpha} (standard error {sigma:.1e}, ESS {float(estimate.effective_sample_size):.0f})",
            exact=exact,
            obtained=float(estimate.value),
            error=error,
            tolerance=_Z * sigma,
        )


def _controls() -> Iterator[Measurement]:
    for alpha in _ALPHAS:
        problem = _problem(alpha)
        estimate, exact = _estimate(problem), problem.control(_STATE, _NOW)
        assert estimate.control is not None and estimate.control_standard_error is not None
        yield Measurement(
            name=f"u*, first of 2 components, at alpha {alpha}",
            exact=float(exact[0, 0]),
            obtained=float(estimate.control[0, 0]),
            error=float((estimate.control - exact).abs().max()),
            tolerance=_Z * float(estimate.control_standard_error.max()),
        )


def _equation() -> Iterator[Measurement]:
    states = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for alpha in _ALPHAS:
        problem = _problem(alpha)
        residual = hjb_residual(problem.value, problem.drift, problem.sigma, alpha=alpha, x=states, t=0.3)
        largest = float(residual.abs().max())
        yield Measurement(
            name=f"HJB residual at alpha {alpha}", exact=0.0, obtained=largest, error=largest, tolerance=1e-12
        )


CHECKS: tuple[Check, ...] = (
    Check(
        name="Feynman-Kac",
        group="soft_value",
        claim="-alpha log E exp(r / alpha) over free paths is the exact linear-Gaussian value.",
        level="fast",
        run=_values,
    ),
    Check(
        name="control from gradient",
        group="soft_value",
        claim="-sigma^T grad v / alpha, by differentiating the paths, is the exact control.",
        level="fast",
        run=_controls,
    ),
    Check(
        name="HJB",
        group="soft_value",
        claim="The exact value solves the HJB equation of the running cost alpha / 2 |u|^2.",
        level="fast",
        run=_equation,
    ),
)
