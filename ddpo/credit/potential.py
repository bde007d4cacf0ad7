"""Intermediate rewards on the predicted clean image, as potential-based shaping over a denoising chain.

States x_0 .. x_T (noise first), a terminal reward r(x_T), a potential phi(x_k) such as the reward of the image that the
network predicts from x_k, and phi(x_T) = 0, as the chain ends there (Ng, Harada & Russell 1999, with gamma = 1):

    F_k = phi(x_{k+1}) - phi(x_k)                              per-step reward, k = 0 .. T-1
    sum_{j >= k} F_j = - phi(x_k)                              it telescopes
    return after step k = r(x_T) - phi(x_k)                    so that an action is credited with what came after it

phi(x_k) does not depend on the action of step k, so the expected policy gradient is that of r alone, for any phi; a
good predictor of r lowers its variance. The potential may be known at some steps only: between them the last value
is held, which is a function of the states up to k and so still no function of the action.

Legend: `B` samples, `T` steps.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpo.validation import FieldError


def held_potential(values: Mapping[int, Tensor], num_steps: int) -> Tensor:
    """Potential before each action, (B, T), from the steps at which it was measured; 0 before the first of them.

    Args:
        values: Step k in [0, T) to phi(x_k), (B,).
        num_steps: T.

    Raises:
        ValueError: No value, or a step outside the chain.
    """
    wrong = [k for k in values if not 0 <= k < num_steps]
    if wrong or not values:
        raise ValueError(f"a potential needs steps in [0, {num_steps}), got {sorted(values)}")
    present = torch.zeros_like(next(iter(values.values())))
    columns = []
    for k in range(num_steps):
        present = values.get(k, present)
        columns.append(present)
    return torch.stack(columns, dim=1)


def check_steps(steps: Sequence[int], num_steps: int) -> None:
    """Raises FieldError unless every step is one of a chain of `num_steps`."""
    wrong = [k for k in steps if not 0 <= k < num_steps]
    if wrong:
        raise FieldError("steps", wrong[0], f"at least 0 and below the number of denoising steps, {num_steps}")
