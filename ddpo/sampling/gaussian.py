"""The Gaussian of one denoising step: its sample, log-density and KL divergence.

Every stochastic sampler of a diffusion model moves from x_k to x_{k+1} ~ N(mean, std^2 I), so that a denoising step is
an action of a policy with a density. B is the batch, D the number of latent dimensions (the product of `latent`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """A batch of Gaussians with one standard deviation for all dimensions of a sample.

    Attributes:
        mean: (B, *latent).
        std: Broadcastable to `mean` with one value per sample, i.e. a scalar or (B, 1, ..., 1).
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise`, (B, *latent).

        Args:
            noise: Standard normal numbers, (B, *latent).
        """
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of `x`, (B,) float64, in nats, summed over the latent dimensions. Valid only where std > 0.

        log N(x; mean, std^2 I) = -||x - mean||^2 / (2 std^2) - D log(std) - D/2 log(2 pi)

        Float64, because policies are told apart by differences of it: it grows with D, to a million nats for a video,
        where neighbouring float32 numbers are a tenth of a nat apart.

        Args:
            x: Next latents, (B, *latent).
        """
        dims, std = self.mean[0].numel(), self._row_std().double()
        squared = (x - self.mean).flatten(1).square().sum(1, dtype=torch.float64)
        return -0.5 * squared / std**2 - dims * (std.log() + 0.5 * math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        """Differential entropy, (B,) float64, in nats: D/2 log(2 pi e) + D log(std); -inf where std is 0."""
        dims, std = self.mean[0].numel(), self._row_std().double()
        return dims * (std.log() + 0.5 * math.log(2 * math.pi * math.e))

    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self || other), (B,), in nats. Valid only where both share std > 0, as a policy and its reference do.

        KL = ||mean - mean_other||^2 / (2 std^2)

        Args:
            other: As many Gaussians, of the same std.
        """
        return 0.5 * ((self.mean - other.mean) / self.std).flatten(1).square().sum(1)

    def _row_std(self) -> Tensor:
        return torch.as_tensor(self.std).expand(self.mean.shape[0], *[1] * (self.mean.ndim - 1)).flatten()
