"""Langevin corrector steps after every step of the sampler (Song et al., arXiv:2011.13456, algorithm 2).

    x <- x + h g + sqrt(2 h) z,    g = -eps_hat(x, k) / s_k  [+ grad_x r(x0_hat(x, k)) / alpha],    z ~ N(0, I)

at the level of the next step's start, C times. -eps_hat / s is the score of the noised data, so that the corrections
leave their law as it is when h goes to 0, and with the reward's part the law times exp(r(x0_hat) / alpha). At a fixed h
they do not: on N(0, 1) they converge to the variance 1 / (1 - h / 2). Here h = `step` s_k^2, or, without a `step`, the
published h = 2 (`ratio` |z| / |g|)^2, by each sample's own norms; no exact law is known of it. (The published factor
1 - beta of VP's thousand fine steps, at least .98, is left out.)

The noise is the corrections' own, so that they work on the ODE too. After the last step nothing is left to correct.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ddpo.sampling.schedule import coefficient
from ddpo.steering.base import Draw, Score, Selection, Steer, weights_of
from ddpo.steering.reward_gradient import slope
from ddpo.trajectory import Condition

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Langevin(Steer):
    """Corrects the state after every step but the last; see the module docstring.

    Attributes:
        score: r, with a gradient where there is an alpha.
        alpha: Reward units per nat; None to leave the reward out.
        corrections: C.
        step: h in units of s_k^2; None for the published one.
        ratio: Of the published h.
    """

    score: Score
    alpha: float | None
    corrections: int
    step: float | None
    ratio: float

    def select(self, draw: Draw, policy: "Policy") -> Selection:
        """The candidates, corrected at the level of the next step."""
        x, k = draw.candidates, draw.state.k + 1
        if k == policy.schedule.num_steps:
            return Selection(latents=x, then=self)
        for number in range(self.corrections):
            noise = draw.state.noise(number)
            drift = self._drift(x, k, draw.state.condition, policy)
            size = self._size(noise, drift, k, policy)
            x = x + size * drift + (2 * size).sqrt() * noise
        return Selection(latents=x, then=self)

    def _drift(self, x: Tensor, k: int, condition: Condition, policy: "Policy") -> Tensor:
        """g, (B, *latent)."""
        s = coefficient(policy.schedule.s, k, x)
        with weights_of(policy, k):
            if self.alpha is None:
                return -policy.predict(k, x, condition).eps / s
            prediction, gradient = slope(self.score, policy, k, x, condition)
        return -prediction.eps / s + gradient / self.alpha

    def _size(self, noise: Tensor, drift: Tensor, k: int, policy: "Policy") -> Tensor:
        """h, broadcastable to the states."""
        if self.step is not None:
            return self.step * coefficient(policy.schedule.s, k, drift).square()
        norms = [part.flatten(1).norm(dim=1) for part in (noise, drift)]
        size = 2 * (self.ratio * norms[0] / norms[1]).square()
        return size.reshape(-1, *[1] * (drift.ndim - 1))
