"""What `train_guidance: none` loses: the conditional policy is trained at states and actions of the guided one.

In one dimension, with exact denoisers of N(1, .5^2) for the caption and N(0, 1) without, all means are affine:

    mean_c = F_c x + g_c + d_c,    mean_u = F_u x + g_u + d_u,    mean_w = mean_u + w (mean_c - mean_u)
    d_c = G x + h + m,             d_u = G x + h                  weights (G, h, m) of each step, m felt with a caption

The last of T steps has no noise and no weights: K = T - 1 are trained.

The guided chain samples. Its policy gradient has the score (x' - mean_w) / std^2 (x, 1, w); training without guidance
takes the conditional one, (x' - mean_c) / std^2 (x, 1, 1): w of the caption's weight is lost, and x' - mean_c is not
centred, so that the reward's correlation with the state enters. Both expectations are exact at G = h = m = 0: the first
by differentiating the chain's moments, the rest by moments of a Gaussian pair, and both are held to simulated paths.
The KL of the conditional policy over the guided one's is that after a small step along what is followed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import gaussian_data_chain
from ddpo.control.diffusion.toy_problem import toy_schedule
from ddpo.sampling.samplers import SamplerConfig

GUIDANCE, NUM_STEPS, NUM_PATHS = 3.0, 6, 400_000
K = NUM_STEPS - 1  # trained
CURVATURE, SLOPE = 1.0, 2.0  # r(x) = -CURVATURE x^2 / 2 + SLOPE x


@dataclass(frozen=True, kw_only=True)
class GuidedChain:
    """The guided chain and how its means differ from the conditional one's, (T,) each.

    Attributes:
        F: Slope of mean_w.
        g: Offset of mean_w.
        std: Of the noise.
        off_slope: Slope of mean_w - mean_c.
        off: Offset of mean_w - mean_c.
    """

    F: Tensor
    g: Tensor
    std: Tensor
    off_slope: Tensor
    off: Tensor

    @classmethod
    def make(cls) -> "GuidedChain":
        """That of the module docstring."""
        schedule = toy_schedule(SamplerConfig(num_steps=NUM_STEPS, guidance_scale=1.0))[1]
        caption, without = (
            gaussian_data_chain(torch.tensor([mean]), torch.tensor([[cov]]), schedule)
            for mean, cov in ((1.0, 0.25), (0.0, 1.0))
        )
        F_c, F_u, g_c, g_u = caption.F[:, 0, 0], without.F[:, 0, 0], caption.g[:, 0], without.g[:, 0]
        F, g = F_u + GUIDANCE * (F_c - F_u), g_u + GUIDANCE * (g_c - g_u)
        return cls(F=F, g=g, std=schedule.std.double(), off_slope=F - F_c, off=g - g_c)

    def moments(self, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of x_0 .. x_T, (T+1,), with the guided mean moved by gain x + shift, (K,) each."""
        means, variances = [torch.zeros((), dtype=torch.float64)], [torch.ones((), dtype=torch.float64)]
        for k in range(NUM_STEPS):
            slope = self.F[k] + (gain[k] if k < K else 0.0)
            means.append(slope * means[-1] + self.g[k] + (shift[k] if k < K else 0.0))
            variances.append(slope**2 * variances[-1] + self.std[k] ** 2)
        return torch.stack(means), torch.stack(variances)

    def gradient(self) -> Tensor:
        """Of E r(x_T) to (G, h, m), (3, K)."""
        gain, shift = torch.zeros(2, K, dtype=torch.float64).requires_grad_().unbind()
        means, variances = self.moments(gain, shift)
        reward = SLOPE * means[-1] - CURVATURE / 2 * (means[-1] ** 2 + variances[-1])
        by_gain, by_shift = torch.autograd.grad(reward, (gain, shift))
        return torch.stack([by_gain, by_shift, GUIDANCE * by_shift])

    def followed(self) -> Tensor:
        """The mean of what training without guidance follows, (3, K)."""
        exact, zero = self.gradient(), torch.zeros(K, dtype=torch.float64)
        means, variances = self.moments(zero, zero)
        last = means[-1]
        reach = torch.stack([self.F[k:].prod() for k in range(K)])
        mean, cov = means[:K], variances[:K] * reach  # of x_k; of x_k and x_T
        with_x = (SLOPE - CURVATURE * last) * cov
        with_square = 2 * SLOPE * mean * cov - CURVATURE * (cov**2 + 2 * mean * last * cov)
        by_gain = (self.off_slope[:K] * with_square + self.off[:K] * with_x) / self.std[:K] ** 2
        by_shift = self.off_slope[:K] * with_x / self.std[:K] ** 2
        return torch.stack([exact[0] + by_gain, exact[1] + by_shift, exact[1] + by_shift])

    def simulated(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Both estimates of every path, (N, 3, K): the guided policy's and the conditional one's."""
        x = torch.randn(NUM_PATHS, generator=generator, dtype=torch.float64)
        guided, conditional = [], []
        for k in range(K):
            noise = self.std[k] * torch.randn(NUM_PATHS, generator=generator, dtype=torch.float64)
            away = noise + self.off_slope[k] * x + self.off[k]
            one = torch.ones_like(x)
            guided.append(noise * torch.stack([x, one, GUIDANCE * one]) / self.std[k] ** 2)
            conditional.append(away * torch.stack([x, one, one]) / self.std[k] ** 2)
            x = self.F[k] * x + self.g[k] + noise
        x = self.F[K] * x + self.g[K]
        reward = SLOPE * x - CURVATURE / 2 * x**2
        worth = reward - reward.mean()
        by_path, without = ((worth * torch.stack(scores)).permute(2, 1, 0) for scores in (guided, conditional))
        return by_path, without

    def kl_ratio(self, step: Tensor) -> float:
        """The conditional policy's path KL over the guided one's for weights `step`, (3, K), at the guided states."""
        zero = torch.zeros(K, dtype=torch.float64)
        means, variances = self.moments(zero, zero)

        def kl(weight: float) -> Tensor:
            moved = step[0] * means[:K] + step[1] + weight * step[2]
            return ((moved**2 + step[0] ** 2 * variances[:K]) / (2 * self.std[:K] ** 2)).sum()

        return float(kl(1.0) / kl(GUIDANCE))


def check_train_guidance() -> Iterator[Measurement]:
    """Both expectations against paths, the angle between them, and the two KLs."""
    chain = GuidedChain.make()
    exact, followed = chain.gradient(), chain.followed()
    names = ("guided: z of 15 weights", "without guidance: z of 15 weights")
    found = []
    for name, wanted, paths in zip(
        names, (exact, followed), chain.simulated(torch.Generator().manual_seed(0)), strict=True
    ):
        found.append(paths.mean(0))
        z = (found[-1] - wanted) / (paths.std(0) / NUM_PATHS**0.5)
        rms, largest = float(z.square().mean().sqrt()), float(z.abs().max())
        yield Measurement(
            name=name,
            exact="rms z 1 (<= 1.5), max <= 4.5",
            obtained=f"rms z {rms:.2f}, max {largest:.1f}",
            error=max(rms / 1.5, largest / 4.5),
            tolerance=1.0,
        )
    predicted, seen = _cosine(exact, followed), _cosine(found[0], found[1])
    yield Measurement(
        name="cosine of the two, length over the gradient's",
        exact=f"predicted {predicted:.3f}, {float(followed.norm() / exact.norm()):.2f}",
        obtained=f"{seen:.3f}, {float(found[1].norm() / found[0].norm()):.2f}",
        error=abs(predicted - seen),
        tolerance=0.02,
    )
    ratio, by_paths = chain.kl_ratio(followed), chain.kl_ratio(found[1])
    yield Measurement(
        name="path KL, conditional over guided, after a step",
        exact=f"predicted {ratio:.3f}",
        obtained=f"{by_paths:.3f}",
        error=abs(by_paths / ratio - 1),
        tolerance=0.05,
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


CHECKS = (
    Check(name="without guidance", group="gradient", level="full", run=check_train_guidance,
          claim="What train_guidance: none follows is predicted: its angle to the gradient, its KL over the guided."),
)  # fmt: skip
