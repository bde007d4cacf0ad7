"""Gaussian mixtures of any dimension: density, score and sampling in closed form, at every noise level.

    p(x) = sum_k w_k N(x; m_k, C_k)
    grad log p(x) = sum_k p(k | x) C_k^(-1) (m_k - x)

A linear noising x_t = a x_0 + s eps keeps the family: w_k, a m_k, a^2 C_k + s^2 I. A mixture is therefore the
simplest data whose exact score is known at every time and which is not Gaussian. Everything is float64.

B points, K components, d dimensions.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GaussianMixture:
    """A mixture of K Gaussians in d dimensions.

    Attributes:
        weights: (K,), positive, summing to one.
        means: (K, d).
        covs: (K, d, d), symmetric positive definite.

    Raises:
        ValueError: The shapes disagree, the weights are no probabilities, or a covariance is not positive definite.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor

    def __post_init__(self) -> None:
        num, dim = self.means.shape
        if self.weights.shape != (num,) or self.covs.shape != (num, dim, dim):
            raise ValueError(
                f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}, covs {tuple(self.covs.shape)}"
                " disagree; give (K,), (K, d) and (K, d, d)"
            )
        total = float(self.weights.detach().sum())
        if bool((self.weights <= 0).any()) or abs(total - 1.0) > 1e-9:
            raise ValueError(f"weights {self.weights.tolist()} must be positive and sum to 1; divide them by {total}")
        if int(torch.linalg.cholesky_ex(self.covs.detach()).info.max()) != 0:
            raise ValueError("a covariance is not positive definite; give symmetric matrices with eigenvalues > 0")

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    @cached_property
    def _cholesky(self) -> Tensor:
        return torch.linalg.cholesky(self.covs)

    def _log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log of w_k N(x; m_k, C_k), (B, K), and the whitened deviations L_k^(-1) (x - m_k), (K, d, B)."""
        deviations = (x[None] - self.means[:, None]).transpose(1, 2)
        white = torch.linalg.solve_triangular(self._cholesky, deviations, upper=False)
        log_det = self._cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = self.weights.log() - log_det - 0.5 * self.dim * torch.log(x.new_tensor(2 * torch.pi))
        return (constant[:, None] - 0.5 * white.square().sum(1)).T, white

    def log_prob(self, x: Tensor) -> Tensor:
        """Density log p, (B,) nats, of points (B, d) in float64; differentiable."""
        return self._log_joint(x)[0].logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of log p, (B, d), of points (B, d) in float64; differentiable."""
        log_joint, white = self._log_joint(x)
        pulls = -torch.linalg.solve_triangular(self._cholesky.transpose(1, 2), white, upper=True)
        return torch.einsum("bk,kdb->bd", log_joint.softmax(1), pulls)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Independent samples, (num, d)."""
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.dim, dtype=torch.float64, generator=generator)
        return self.means[component] + torch.einsum("bij,bj->bi", self._cholesky[component], noise)

    def marginal(self, scale: Tensor | float, std: Tensor | float) -> "GaussianMixture":
        """The law of scale * x + std * eps, eps ~ N(0, I); differentiable in both numbers."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        return GaussianMixture(weights=self.weights, means=scale * self.means, covs=scale**2 * self.covs + std**2 * eye)

    def mean(self) -> Tensor:
        """E x, (d,)."""
        return self.weights @ self.means

    def cdf(self, x: Tensor, axis: int = 0) -> Tensor:
        """P(X_axis <= x) of one coordinate, same shape as x."""
        std = self.covs[:, axis, axis].sqrt()
        return torch.special.ndtr((x[..., None] - self.means[:, axis]) / std) @ self.weights


def gaussian_mixture(weights: list[float], means: list[list[float]], stds: list[float]) -> GaussianMixture:
    """A mixture of isotropic Gaussians from plain numbers: K weights, K means of length d, K standard deviations."""
    centres = torch.tensor(means, dtype=torch.float64)
    eye = torch.eye(centres.shape[1], dtype=torch.float64)
    variances = torch.tensor(stds, dtype=torch.float64).square()
    return GaussianMixture(
        weights=torch.tensor(weights, dtype=torch.float64), means=centres, covs=variances[:, None, None] * eye
    )
