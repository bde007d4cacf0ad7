"""The evidence lower bound of a diffusion, as the verification identity and as weighted denoising score matching.

A generative process with the control u = sigma s runs the forward SDE dY = c(t) Y dt + sigma(t) dB backwards from p_T
(`ddpo.control.diffusion.time_reversal`). Its path law differs from the true reversal's by 1/2 E int |u - u*|^2 dt
(Girsanov), the gap of the verification identity along the *data's* noisy paths, hence

    -E log p^s(y_0)  <=  L(s) = H(p_0) + 1/2 int sigma^2 E |s(y_t, t) - grad log p_t(y_t)|^2 dt.

Neither H(p_0) nor the score is known of data. With y_t = a_t y_0 + s_t eps, E[-eps / s_t | y_t] is the score (Vincent
2011), and dH(p_t)/dt = d c + sigma^2 E |grad log p_t|^2 / 2, so all that is unknown cancels:

    L(s) = H(p_T) - d log a_T + 1/2 int sigma^2 ( E |s(y_t, t) + eps / s_t|^2 - d / s_t^2 ) dt

the denoising loss, weighted by sigma^2 / 2 (Song et al., arXiv:2101.09258, theorem 1), and constants. Other weights
train the same score, and bound nothing. One dimension; expectations are Gauss-Hermite sums over y_0 and eps, float64.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddpo.control.diffusion.time_reversal import TimeReversal

TimedScore = Callable[[Tensor, Tensor], Tensor]
"""s(y, t), (B, 1), of noisy data (B, 1) at a scalar forward time."""


def denoising_bound(
    problem: TimeReversal, score: TimedScore, *, num_times: int = 96, num_nodes: int = 48
) -> tuple[float, float]:
    """L(s) in nats, and the weighted denoising loss in it, without the parts that no score changes.

    Args:
        problem: One-dimensional data, and the SDE.
        score: Of forward time.
        num_times: Gauss-Legendre nodes in time.
        num_nodes: Gauss-Hermite nodes of each of y_0 and eps.

    Raises:
        ValueError: The data have more than one dimension.
    """
    data, sde = problem.data, problem.sde
    if data.dim != 1:
        raise ValueError(f"the data have {data.dim} dimensions; the quadrature is of one")
    clean, eps, weight = _pairs(problem, num_nodes)
    end = torch.tensor(sde.horizon, dtype=torch.float64)
    last = sde.scale(end) * clean + sde.std(end) * eps
    entropy = -float(weight @ data.marginal(sde.scale(end), sde.std(end)).log_prob(last))
    nodes, lengths = np.polynomial.legendre.leggauss(num_times)
    loss = 0.0
    for t, length in zip(0.5 * sde.horizon * (nodes + 1), 0.5 * sde.horizon * lengths, strict=True):
        time = torch.tensor(t, dtype=torch.float64)
        std = sde.std(time)
        missed = (score(sde.scale(time) * clean + std * eps, time) + eps / std).square().sum(1)
        loss += 0.5 * length * float(sde.diffusion(time) ** 2 * (weight @ missed - 1 / std**2))
    return entropy - float(sde.scale(end).log()) + loss, loss


def _pairs(problem: TimeReversal, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean data and noise, (N, 1) each, with their weights, (N,): a grid for every component."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    data = problem.data
    std = data.covs[:, 0, 0].sqrt()
    clean = (data.means[:, :1] + std[:, None] * z)[:, :, None].expand(-1, -1, num_nodes)
    eps = z.expand_as(clean)
    weight = data.weights[:, None, None] * w[:, None] * w
    return clean.reshape(-1, 1), eps.reshape(-1, 1), weight.flatten()
