"""The losses of clean-sample regression as functions of tensors: identities that their formulas do not share."""

import math

import pytest
import torch

from ddpo.control.checks import clean_sample
from ddpo.control.checks.clean_sample import HALF, mixture
from ddpo.control.diffusion.regression_minimiser import expected_gradient, minimiser
from ddpo.objectives.clean_sample_presets import PRESETS
from ddpo.objectives.regression_losses import LOSSES, RHO, Compared, huber, relative, squared

BOUND = 5.0


def compared(seed=0, *, count=6, worth=None):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Compared(
        output=randn(count, 2, 3).requires_grad_(),
        data=randn(count, 2, 3),
        anchor=randn(count, 2, 3),
        old=randn(count, 2, 3),
        worth=randn(count) if worth is None else worth,
        noise=torch.rand(count, generator=generator, dtype=torch.float64),
    )


def gradient(target, x, *, multiplier, normalisation="none"):
    loss = LOSSES[target](x, rho=RHO[normalisation], multiplier=multiplier, bound=BOUND)
    assert loss.shape == (6,)
    return torch.autograd.grad(loss.sum(), x.output)[0]


@pytest.mark.parametrize("multiplier", [0.2, 3.0])
def test_contrast_is_the_shifted_loss_over_its_multiplier_wherever_the_output_is(multiplier):
    x = compared()
    both, one = gradient("contrast", x, multiplier=multiplier), gradient("shifted", x, multiplier=multiplier)
    torch.testing.assert_close(both * multiplier, one, rtol=1e-12, atol=1e-12)


def test_the_shifted_loss_vanishes_at_its_target_alone():
    x = compared()
    target = x.anchor + 3.0 * x.worth[:, None, None] * (x.data - x.old)
    at = Compared(output=target, data=x.data, anchor=x.anchor, old=x.old, worth=x.worth, noise=x.noise)
    loss = LOSSES["shifted"](at, rho=squared, multiplier=3.0, bound=BOUND)
    assert float(loss.abs().max()) < 1e-24
    assert float(LOSSES["shifted"](x, rho=squared, multiplier=3.0, bound=BOUND).detach().min()) > 0.1


def test_a_worthless_sample_does_not_move_the_output_of_the_sample_loss():
    x = compared(worth=torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 0.5], dtype=torch.float64))
    moved = gradient("sample", x, multiplier=0.2).flatten(1).norm(dim=1)
    assert [bool(value) for value in moved == 0] == [True, False, False, False, True, False]


def test_a_relative_error_has_the_gradient_of_the_square_over_a_fixed_size():
    difference = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (found,) = torch.autograd.grad(relative(difference, torch.ones(4)).sum(), difference)
    size = difference.detach().abs().mean(1, keepdim=True)
    torch.testing.assert_close(found, 2 * difference.detach() / (5 * size))
    assert float(relative(torch.zeros(1, 5), torch.ones(1))) == 0, "a vanishing error is not divided by itself"


def test_hubers_gradient_falls_with_the_error_where_the_squares_does_not():
    for size in (1.0, 16.0):  # p = 1/4: the square's times t l^(p - 1), l the mean square
        difference = torch.full((1, 3), math.sqrt(size), dtype=torch.float64, requires_grad=True)
        own, plain = (
            torch.autograd.grad(rho(difference, torch.tensor([0.5])).sum(), difference)[0] for rho in (huber, squared)
        )
        ratio = own / plain
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.5 * size**-0.75), rtol=1e-6, atol=0)


def test_nfts_code_does_not_find_what_its_theory_says():
    """Of one dimension its normalised errors are absolute values, which make a median of what should be a mean."""
    data, knobs = mixture(), PRESETS["nft_published"]
    advantage = 3.0 * torch.tanh(data.z)
    advantage = advantage - data.mean(advantage)
    old = HALF.velocity(data)
    right = minimiser(PRESETS["nft"], HALF, data, advantage, anchor=old, old=old)

    def pull(knobs, output):
        return expected_gradient(knobs, HALF, data, advantage, output=output, anchor=old, old=old).abs().mean()

    assert float(pull(PRESETS["nft"], right) / pull(PRESETS["nft"], old)) < 1e-10
    assert float(pull(knobs, right) / pull(knobs, old)) > 0.2


@pytest.mark.parametrize("check", clean_sample.CHECKS, ids=lambda check: check.name)
def test_every_check_passes(check):
    rows = list(check.run())
    assert rows and [row.name for row in rows if not row.passed] == []
