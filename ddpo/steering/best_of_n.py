"""The best of N plain samples.

For a continuous reward its law has the density N F(r)^(N-1) relative to the sampler's, F the reward's distribution
function, so that its KL to the sampler is log N - (N - 1) / N nats; with ties it is less.
"""

import math

import torch
from torch import Tensor

from ddpo.steering.base import Steer, Weighing


class Best(Steer):
    """Steers nothing on the way."""

    def weigh(self, scores: Tensor) -> Weighing:
        """All weight on the best, the first of equals."""
        best = torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1])
        return Weighing(log_weights=torch.where(best > 0, 0.0, -math.inf).double())
