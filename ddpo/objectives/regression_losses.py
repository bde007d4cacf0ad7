"""The losses of regression on clean samples, one value a sample: tensors in, no networks.

    f       what the network returns on x = a z + s eps, with its graph
    f*      what it should have returned: the output that stands for (z, eps)
    anchor  what frozen weights return there: the pretrained ones, or the old policy's
    old     what the old policy returns there
    A       what the sample is worth, m a multiplier, c a bound on |A|

    sample      A m rho(f - f*)
    shifted     rho(f - (anchor + m A (f* - old)))
    contrast    (c / beta) [ r rho(b - e) + (1 - r) rho(b + e) ],
                b = beta (f - anchor), e = f* - old, beta = 1 / (m c), r = (1 + A / c) / 2

with rho the squared error, a mean over the D latent dimensions, or one that is normalised. Where f = anchor = old and
rho is the square, all three have the gradient 2 m A (old - f*) / D, up to the factor 1 / m of `contrast`; and without
normalisation `contrast` is (1 / m) `shifted` plus a constant, wherever f is:

    r |b - e|^2 + (1 - r) |b + e|^2 = |b|^2 - 2 (A / c) b.e + |e|^2 = beta^2 |f - anchor - m A e|^2 + const.

The minimiser of `shifted` is E[anchor + m A (f* - old) | x]. N samples of latents `latent`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Target = Literal["sample", "shifted", "contrast", "group"]
Normalisation = Literal["none", "relative", "huber"]
Rho = Callable[[Tensor, Tensor], Tensor]
RegressionLoss = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What N samples were regressed on.

    Attributes:
        output: f, (N, *latent).
        data: f*, (N, *latent).
        anchor: (N, *latent); None for `sample`.
        old: (N, *latent); None for `sample`.
        worth: A, (N,).
        noise: Share of noise in the states, s / (a + s), (N,).
    """

    output: Tensor
    data: Tensor
    anchor: Tensor | None
    old: Tensor | None
    worth: Tensor
    noise: Tensor

    @property
    def frozen(self) -> tuple[Tensor, Tensor]:
        """The anchor's and the old policy's outputs."""
        assert self.anchor is not None and self.old is not None, "these weights were run"
        return self.anchor, self.old


SMALLEST_ERROR = 1e-5  # by which a relative error is divided at the least
HUBER_POWER = 0.25


def squared(difference: Tensor, noise: Tensor) -> Tensor:
    """Mean square over the latent dimensions, (N,).

    Args:
        difference: (N, *latent).
        noise: Unused.
    """
    return difference.square().flatten(1).mean(1)


def relative(difference: Tensor, noise: Tensor) -> Tensor:
    """Mean square over the mean absolute value, which has no gradient, (N,); arguments as for `squared`."""
    size = difference.detach().abs().flatten(1).mean(1)
    return squared(difference, noise) / size.clamp(min=SMALLEST_ERROR)


def huber(difference: Tensor, noise: Tensor) -> Tensor:
    """Share of noise times ((l + e)^p - e^p) / p of the mean square l, with p = 1/4 and e = 1e-10, (N,).

    Args:
        difference: (N, *latent).
        noise: Share of noise in the states, s / (a + s), (N,).
    """
    error = squared(difference, noise)
    return noise / HUBER_POWER * ((error + 1e-10) ** HUBER_POWER - 1e-10**HUBER_POWER)


RHO: dict[Normalisation, Rho] = {"none": squared, "relative": relative, "huber": huber}


def sample_loss(x: Compared, *, rho: Rho, multiplier: float, bound: float) -> Tensor:
    """`sample` of the module docstring, (N,).

    Args:
        x: Outputs and worths.
        rho: Of differences and shares of noise.
        multiplier: m.
        bound: Unused.
    """
    return x.worth * multiplier * rho(x.output - x.data, x.noise)


def shifted_loss(x: Compared, *, rho: Rho, multiplier: float, bound: float) -> Tensor:
    """`shifted` of the module docstring, (N,); arguments as for `sample_loss`."""
    anchor, old = x.frozen
    worth = x.worth.reshape(-1, *[1] * (x.data.ndim - 1))
    return rho(x.output - (anchor + multiplier * worth * (x.data - old)), x.noise)


def contrast_loss(x: Compared, *, rho: Rho, multiplier: float, bound: float) -> Tensor:
    """`contrast` of the module docstring, (N,); arguments as for `sample_loss`, with a finite `bound` c on |A|."""
    anchor, old = x.frozen
    beta, share = 1 / (multiplier * bound), (1 + x.worth / bound) / 2
    step, error = beta * (x.output - anchor), x.data - old
    return bound / beta * (share * rho(step - error, x.noise) + (1 - share) * rho(step + error, x.noise))


LOSSES: dict[Target, RegressionLoss] = {"sample": sample_loss, "shifted": shifted_loss, "contrast": contrast_loss}
