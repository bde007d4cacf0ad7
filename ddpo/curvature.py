"""The Fisher matrix of a policy's steps: products with it, its diagonal, and linear systems in it.

A step is N(mu(theta), s^2 I) with s fixed, so its Fisher matrix by the trained weights is exactly

    F = E[ J^T J ] / s^2,    J = d mu / d theta,    KL(theta || theta + v) = v^T F v / 2 + O(|v|^3)

the mean over states and steps. It is never formed. A product differentiates the whitened mean m = mu / s twice:

    forward    J v by dual numbers beside the pass, then J^T (J v) by one backward pass    (Pearlmutter 1994)
    reverse    J v as the derivative of u -> (J^T u) . v, which is linear in u: a backward pass of a backward pass

Its diagonal is estimated by E_z[(J^T z)^2], z standard normal (Bekas et al. 2007). Attention runs in the plain kernel
meanwhile: fused ones have neither forward derivatives nor second ones.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpo.policy import Policy
from ddpo.validation import UserError

Vector = dict[str, Tensor]
"""A direction in the trained weights, by their names."""
Whitened = Callable[[], Tensor]
"""A pass of the network: the means of N steps over their standard deviations, (N, *latent), with a graph."""


@dataclass(kw_only=True)
class FisherProducts:
    """Products with the sum over N steps of J^T J / s^2.

    Attributes:
        policy: Whose weights they are of.
        tell: Told once, in a line, where products are made otherwise than by forward derivatives.
        reverse: Whether they are.
    """

    policy: Policy
    tell: Callable[[str], None]
    reverse: bool = field(default=False)

    def product(self, whitened: Whitened, direction: Mapping[str, Tensor]) -> Vector:
        """F v, not divided by N.

        Args:
            whitened: The pass.
            direction: v.

        Raises:
            UserError: The network's operations have neither forward derivatives nor second ones.
        """
        with plain_attention():
            if self.reverse:
                return self._by_reverse(whitened, direction)
            try:
                return self._by_forward(whitened, direction)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                self.reverse = True
                reason = _first_line(error)
                self.tell(f"Fisher products by two backward passes, as forward derivatives fail here: {reason}")
                return self._by_reverse(whitened, direction)

    def pulled_back(self, whitened: Whitened, cotangent: Tensor) -> Vector:
        """J^T z / s of any z (N, *latent), not divided by N."""
        with plain_attention():
            return self._transposed(whitened(), cotangent)

    def _by_forward(self, whitened: Whitened, direction: Mapping[str, Tensor]) -> Vector:
        with forward_ad.dual_level():
            with self.policy.moving(direction):
                mean, change = forward_ad.unpack_dual(whitened())
            change = torch.zeros_like(mean) if change is None else change.detach().clone()
        return self._transposed(mean, change)

    def _by_reverse(self, whitened: Whitened, direction: Mapping[str, Tensor]) -> Vector:
        own = self.policy.trainable()
        mean = whitened()
        free = torch.zeros_like(mean, requires_grad=True)
        try:
            rows = torch.autograd.grad(mean, list(own.values()), free, create_graph=True, allow_unused=True)
            along = [(row * direction[name]).sum() for name, row in zip(own, rows, strict=True) if row is not None]
            (change,) = torch.autograd.grad(torch.stack(along).sum(), free, retain_graph=True)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(
                "optimizer.kind must be adamw with this network: it has neither forward derivatives nor second ones "
                f"({_first_line(error)})"
            ) from error
        return self._transposed(mean, change.detach())

    def _transposed(self, mean: Tensor, cotangent: Tensor) -> Vector:
        own = self.policy.trainable()
        rows = torch.autograd.grad(mean, list(own.values()), cotangent.to(mean), allow_unused=True)
        return {
            name: torch.zeros_like(value) if row is None else row
            for (name, value), row in zip(own.items(), rows, strict=True)
        }


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention in operations that can be differentiated forward and twice, for the time of a `with` block."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---- vectors and linear systems -------------------------------------------------------------------------------------


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Scalar product, summed in float64."""
    return float(sum((one[name].double() * other[name].double()).sum() for name in one))


def combined(one: Mapping[str, Tensor], factor: float, other: Mapping[str, Tensor]) -> Vector:
    """One + factor other."""
    return {name: value + factor * other[name] for name, value in one.items()}


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Of a linear system A x = b.

    Attributes:
        x: The last iterate.
        residual: |b - A x| / |b| in the norm of the inverse metric.
        iterations: Products that were taken.
    """

    x: Vector
    residual: float
    iterations: int


def conjugate_gradients(
    product: Callable[[Vector], Vector],
    target: Mapping[str, Tensor],
    *,
    metric: Mapping[str, Tensor] | None = None,
    iterations: int,
    tolerance: float,
) -> Solution:
    """Solves A x = b for a symmetric positive A, from x = 0 (Hestenes and Stiefel 1952).

    Every iterate has a positive product with b, so that a step along it goes up wherever it is stopped.

    Args:
        product: x -> A x.
        target: b.
        metric: Diagonal of a preconditioner, positive; None for the identity.
        iterations: At most so many products.
        tolerance: Stops at this residual.
    """

    def preconditioned(r: Mapping[str, Tensor]) -> Vector:
        return {name: value if metric is None else value / metric[name] for name, value in r.items()}

    x = {name: torch.zeros_like(value) for name, value in target.items()}
    r = dict(target)
    z = preconditioned(r)
    p, start, taken = z, dot(r, z), 0
    rho = start
    while taken < iterations and rho > tolerance**2 * start and rho > 0:
        image = product(p)
        taken += 1
        curvature = dot(p, image)
        if not curvature > 0:  # rounding: nothing is left to find along p
            break
        x, r = combined(x, rho / curvature, p), combined(r, -rho / curvature, image)
        z = preconditioned(r)
        rho, before = dot(r, z), rho
        p = combined(z, rho / before, p)
    return Solution(x=x, residual=(rho / start) ** 0.5 if start > 0 else 0.0, iterations=taken)
