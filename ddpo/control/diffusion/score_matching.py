"""Denoising score matching: learning the score of data from noisy copies of it (Vincent 2011).

    minimise over s    E_x E_{x~ = x + sigma eps}  1/2 |s(x~) + (x~ - x) / sigma^2|^2

Its minimiser is the score of the data *smoothed* by N(0, sigma^2 I), not of the data: sigma trades bias for coverage.
Where the smoothed density is small there are no samples, and a small sigma leaves the score there to chance; a large
one puts samples everywhere, at the cost of a blurred law (Song and Ermon, arXiv:1907.05600, section 3.2). On a
mixture of Gaussians the smoothed score is exact, and both effects can be measured.

N data, n minibatch, d dimensions. Training is float32; scores are compared in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpo.control.problems.mixture import GaussianMixture

Score = Callable[[Tensor], Tensor]
"""grad log p, (B, d), of points (B, d)."""


class ScoreNetwork(nn.Module):
    """s(x) = net(x / data_std) / sigma, three layers; the division makes the loss of order one at every sigma.

    Args:
        dim: d.
        noise_std: sigma.
        data_std: The scale of the noisy data.
        width: Of the hidden layers.
        generator: Of the initial weights.
    """

    def __init__(
        self, dim: int, *, noise_std: float, data_std: float, generator: torch.Generator, width: int = 64
    ) -> None:
        super().__init__()
        self.noise_std, self.data_std = noise_std, data_std
        self.net = nn.Sequential(
            nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
        )
        for parameter in self.net.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """The score at points (B, d), in their dtype."""
        score: Tensor = self.net(x.float() / self.data_std) / self.noise_std
        return score.to(x.dtype)


def denoising_loss(score: Score, data: Tensor, *, noise_std: float, generator: torch.Generator) -> Tensor:
    """1/(2n) sum_i |s(x~_i) + (x~_i - x_i) / sigma^2|^2 on one perturbation of a minibatch (n, d), a scalar."""
    noisy = data + noise_std * torch.randn(data.shape, dtype=data.dtype, generator=generator)
    return 0.5 * (score(noisy) + (noisy - data) / noise_std**2).square().sum(1).mean()


def learn_score(
    data: Tensor,
    *,
    noise_std: float,
    generator: torch.Generator,
    num_steps: int = 2000,
    batch_size: int = 512,
    learning_rate: float = 5e-3,
    width: int = 64,
) -> ScoreNetwork:
    """Trains a network on data by minibatch, perturbation and Adam, its learning rate falling to zero as a cosine.

    The loss is multiplied by sigma^2, which changes its size and not its minimiser.

    Args:
        data: (N, d).
        noise_std: sigma > 0.
        generator: Of the weights, minibatches and perturbations.
        num_steps: Gradient steps.
        batch_size: n.
        learning_rate: At the start.
        width: Of the hidden layers.

    Raises:
        ValueError: noise_std is not positive.
    """
    if noise_std <= 0:
        raise ValueError(f"noise_std {noise_std} must be positive: without noise there is nothing to match")
    samples = data.float()
    scale = float((samples.var() + noise_std**2).sqrt())
    network = ScoreNetwork(data.shape[1], noise_std=noise_std, data_std=scale, generator=generator, width=width)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        batch = samples[torch.randint(len(samples), (batch_size,), generator=generator)]
        loss = noise_std**2 * denoising_loss(network, batch, noise_std=noise_std, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class ScoreError:
    """Relative squared errors E |s - s*|^2 / E |s*|^2 of a score, uniformly over two parts of a box.

    Attributes:
        high_density: Where the data's own density is at least `threshold` of its maximum in the box.
        low_density: Elsewhere.
    """

    high_density: float
    low_density: float


def score_error(
    score: Score,
    data: GaussianMixture,
    *,
    noise_std: float,
    low: Tensor,
    high: Tensor,
    generator: torch.Generator,
    num_points: int = 4000,
    threshold: float = 0.01,
) -> ScoreError:
    """Compares a learned score with that of `data` smoothed by noise_std.

    The two parts depend on the data and not on the noise, so that errors at different noise levels are of the same
    places.

    Args:
        score: The score to be judged.
        data: The law of the data, without noise.
        noise_std: sigma.
        low: Lower corner of the box, (d,).
        high: Upper corner, (d,).
        generator: Of the points.
        num_points: In the box.
        threshold: What counts as low density, relative to the maximum.
    """
    points = low + (high - low) * torch.rand(num_points, data.dim, dtype=torch.float64, generator=generator)
    exact = data.marginal(1.0, noise_std).score(points)
    missed = (score(points) - exact).square().sum(1)
    log_density = data.log_prob(points)
    dense = log_density >= log_density.max() + torch.log(torch.tensor(threshold))
    size = exact.square().sum(1)
    return ScoreError(
        high_density=float(missed[dense].sum() / size[dense].sum()),
        low_density=float(missed[~dense].sum() / size[~dense].sum()),
    )


def langevin(score: Score, start: Tensor, *, step_size: float, num_steps: int, generator: torch.Generator) -> Tensor:
    """Unadjusted Langevin dynamics x <- x + h s(x) + sqrt(2 h) z from points (B, d).

    Its law tends to that of the score up to an error of order h, and slowly where modes are far apart. Started at each
    of a falling series of noise levels from the samples of the one before, it is annealed Langevin sampling.
    """
    x = start
    for _ in range(num_steps):
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        x = x + step_size * score(x) + (2 * step_size) ** 0.5 * noise
    return x


def kolmogorov_distance(samples: Tensor, law: GaussianMixture, axis: int = 0) -> float:
    """Largest |F_n - F| of one coordinate of samples (B, d); about 0.87 / sqrt(B) for independent exact samples."""
    ordered = samples[:, axis].sort().values.double()
    num = len(ordered)
    exact = law.cdf(ordered, axis)
    ranks = torch.arange(num + 1, dtype=torch.float64) / num
    return float(torch.maximum(ranks[1:] - exact, exact - ranks[:-1]).max())
