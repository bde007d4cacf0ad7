"""What is trained beside the exact denoiser of a toy problem: the heads that move its prediction, zero at first.

    affine    u_k(x) = gain_k x + shift_k                           every step has weights of its own
    shared    u_k(x) = sum_f phi_f(k) (gain_f x + shift_f)          all steps have the same, as in a real network
    mlp       a tanh network of x and a learnt embedding of k

A head of the first or third kind moves the mean of step k by std_k u_k, so that u is the control and KL_k is
||u_k||^2 / 2; steps without noise are not moved. The shared head moves the predicted velocity of every step, i.e. x0 by
s_k u_k: weights that are trained for the noisy steps then move the others too, as those of a real network do.

T steps, d dimensions, F features, B batch.
"""

from typing import Literal

import torch
from torch import Tensor, nn

HeadKind = Literal["affine", "shared", "mlp"]
NUM_FEATURES = 3


class AffineHead(nn.Module):
    """u_k(x) = gain_k x + shift_k, zero at first."""

    def __init__(self, num_steps: int, dims: int) -> None:
        """Makes T gains (d, d) and shifts (d,)."""
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(num_steps, dims, dims))
        self.shift = nn.Parameter(torch.zeros(num_steps, dims))

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """The control at states (B, d) at steps (B,)."""
        return torch.einsum("bij,bj->bi", self.gain[k], x) + self.shift[k]


class SharedHead(nn.Module):
    """u_k(x) = sum_f phi_f(k) (gain_f x + shift_f), zero at first."""

    features: Tensor

    def __init__(self, num_steps: int, dims: int) -> None:
        """Makes F gains (d, d) and shifts (d,), whatever the number of steps."""
        super().__init__()
        self.register_buffer("features", step_features(num_steps).float(), persistent=False)
        self.gain = nn.Parameter(torch.zeros(NUM_FEATURES, dims, dims))
        self.shift = nn.Parameter(torch.zeros(NUM_FEATURES, dims))

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """What moves the velocity at states (B, d) at steps (B,)."""
        each = torch.einsum("fij,bj->bfi", self.gain, x) + self.shift
        return torch.einsum("bf,bfi->bi", self.features[k], each)


class MLPHead(nn.Module):
    """u_k(x) by a tanh network of x and a learnt embedding of k; its last layer is zero at first."""

    def __init__(self, num_steps: int, dims: int, *, width: int = 64) -> None:
        """Makes a network of two hidden layers."""
        super().__init__()
        self.enter = nn.Linear(dims, width)
        self.step = nn.Embedding(num_steps, width)
        self.middle = nn.Linear(width, width)
        self.leave = nn.Linear(width, dims)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        """The control at states (B, d) at steps (B,)."""
        hidden = torch.tanh(self.enter(x) + self.step(k))
        return self.leave(torch.tanh(self.middle(hidden)))


def step_features(num_steps: int) -> Tensor:
    """1, t, t^2 with t from -1 at the first step to 1 at the last, (T, F) float64."""
    t = torch.linspace(-1.0, 1.0, num_steps, dtype=torch.float64)
    return torch.stack([t**power for power in range(NUM_FEATURES)], dim=1)


def make_head(kind: HeadKind, num_steps: int, dims: int) -> nn.Module:
    """A fresh head."""
    heads: dict[HeadKind, type[AffineHead | SharedHead | MLPHead]] = {
        "affine": AffineHead, "shared": SharedHead, "mlp": MLPHead
    }  # fmt: skip
    return heads[kind](num_steps, dims)
