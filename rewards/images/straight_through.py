"""Steps in differentiable scores: forward as they are, backward as if smooth (Bengio et al., arXiv:1308.3432).

value of `hard`, gradient of `soft`:    soft + (hard - soft) held constant
"""

from __future__ import annotations

from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`, of equal shapes."""
    return soft + (hard - soft).detach()


def rounded(x: Tensor) -> Tensor:
    """Whole numbers nearest to x, with the gradient of x."""
    return straight_through(x.round(), x)
