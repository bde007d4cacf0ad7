"""A one-dimensional chain with any mean functions, solved on a grid: the exact J of a network, and both optima.

    V_T = r,   V_k(x) = int N(y; mean_k(x), std_k^2) V_{k+1}(y) dy - alpha (mean_k(x) - mean_ref,k(x))^2 / (2 std_k^2)

for a given policy; the maximum over mean_k(x) for the optimum with the sampler's noise; and, where the noise may be
chosen too, the soft value V_k(x) = alpha log int N(y; mean_ref,k(x), std_k^2) exp(V_{k+1}(y) / alpha) dy.

The integrals are trapezoid sums on a uniform grid, which converge exponentially for smooth integrands (Trefethen and
Weideman 2014): of the Gaussian alone the error is exp(-2 pi^2 std^2 / h^2), 1e-13 at spacing h = .8 std. The default
spacing of .2 std leaves room for value functions that are steeper, such as between the modes of a mixture. The grid
must reach so far that paths do not leave it; steps without noise may only follow the last one with noise. n grid
points, T steps; float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MeanFunction = Callable[[int, Tensor], Tensor]

_NEWTON_STEPS = 60
_SPACING = 0.2


@dataclass(frozen=True, kw_only=True)
class GridChain:
    """A one-dimensional problem on a grid.

    Attributes:
        grid: (n,) float64, uniform and symmetric.
        std: Of each step, (T,); positive, then zeros.
        reference: (k, x (n,)) -> means of the pretrained policy (n,).
        reward: x (n,) -> r (n,).
        alpha: Reward units per nat.
    """

    grid: Tensor
    std: Tensor
    reference: MeanFunction
    reward: Callable[[Tensor], Tensor]
    alpha: float

    def value(self, mean: MeanFunction) -> float:
        """J of a policy with these means and the sampler's noise, under the prior N(0, 1)."""
        return self._under_prior(self._backward(lambda k, after: self._evaluate(k, mean(k, self.grid), after)))

    def optimum(self) -> tuple[float, Sequence[Tensor]]:
        """The best J with the sampler's noise, and the best means on the grid, one (n,) for each noisy step."""
        means: list[Tensor] = []

        def improve(k: int, after: Tensor) -> Tensor:
            means.append(self._best_mean(k, after))
            return self._evaluate(k, means[-1], after)

        value = self._under_prior(self._backward(improve))
        return value, means[::-1]

    def soft_optimum(self) -> float:
        """The best J if the noise of each step may be chosen as well: the mean soft value at x_0."""
        return self._under_prior(self._backward(self._soften))

    def log_z(self) -> float:
        """Log E exp(r(x_T) / alpha) under the pretrained chain."""
        return math.log(self._under_prior((self._backward(self._soften) / self.alpha).exp()))

    def _soften(self, k: int, after: Tensor) -> Tensor:
        """The soft value before step k of that after it."""
        top = after.max()
        weights = self._kernel(k, self.reference(k, self.grid))
        return top + self.alpha * (weights @ ((after - top) / self.alpha).exp()).log()

    def _backward(self, step: Callable[[int, Tensor], Tensor]) -> Tensor:
        """V_0 on the grid."""
        last = int((self.std > 0).sum()) - 1
        x = self.grid
        for k in range(last + 1, len(self.std)):
            x = self.reference(k, x)
        value = self.reward(x)
        for k in range(last, -1, -1):
            value = step(k, value)
        return value

    def _evaluate(self, k: int, mean: Tensor, after: Tensor) -> Tensor:
        shift = (mean - self.reference(k, self.grid)) / self.std[k]
        return self._kernel(k, mean) @ after - 0.5 * self.alpha * shift.square()

    def _kernel(self, k: int, mean: Tensor) -> Tensor:
        """Weights of the transition density on the grid, (n, n)."""
        z = (self.grid - mean[:, None]) / self.std[k]
        spacing = self.grid[1] - self.grid[0]
        return torch.exp(-0.5 * z.square()) * spacing / (self.std[k] * (2 * torch.pi) ** 0.5)

    def _best_mean(self, k: int, after: Tensor) -> Tensor:
        """The maximiser at every grid point, by Newton's method from the best of a coarse scan of the control."""
        reference, std = self.reference(k, self.grid), self.std[k]
        candidates = torch.linspace(-8.0, 8.0, 81, dtype=torch.float64)
        scanned = torch.stack([self._evaluate(k, reference + std * u, after) for u in candidates])
        u = candidates[scanned.argmax(0)]
        for _ in range(_NEWTON_STEPS):
            mean = reference + std * u
            weights = self._kernel(k, mean)
            z = (self.grid - mean[:, None]) / std
            slope = (weights * z) @ after - self.alpha * u
            curvature = (weights * (z.square() - 1)) @ after - self.alpha
            step = torch.where(curvature < 0, -slope / curvature, torch.zeros_like(slope)).clamp(-0.2, 0.2)
            u = u + step
            if float(step[1:-1].abs().max()) < 1e-12:
                break
        return reference + std * u

    def _under_prior(self, value: Tensor) -> float:
        spacing = self.grid[1] - self.grid[0]
        density = torch.exp(-0.5 * self.grid.square()) / (2 * torch.pi) ** 0.5
        return float((density * value).sum() * spacing)


def make_grid(std: Tensor, *, reach: float = 9.0) -> Tensor:
    """A uniform grid on [-reach, reach], fine enough for the smallest positive std."""
    smallest = float(std[std > 0].min())
    half = int(reach / (_SPACING * smallest)) + 1
    return torch.linspace(-reach, reach, 2 * half + 1, dtype=torch.float64)
