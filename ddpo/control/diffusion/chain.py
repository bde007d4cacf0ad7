"""A diffusion chain that is exactly solvable: affine Gaussian steps and a quadratic reward.

    x_0 ~ N(prior_mean, prior_cov),   x_{k+1} = F_k x_k + g_k + noise,   noise ~ N(0, C_k),   k = 0 .. T-1
    r(x_T) = -1/2 x_T' Q x_T + q' x_T + c
    J = E r(x_T) - alpha sum_k E KL_k,   KL_k = ||C_k^(-1/2) (mean_k(x_k) - mean_ref,k(x_k))||^2 / 2

with the sum over steps that have noise: a step without noise has no density, hence no KL, and the recursion leaves it
as the reference has it. (In a network whose steps share their weights it moves all the same; `ToyProblem` has that.)
DDIM and flow-SDE samplers of Gaussian data with the exact score are such chains (`gaussian_data_chain`). States stay
Gaussian, so J and its gradient are finite sums, and the policy that maximises J is one backward Riccati recursion.
Everything is float64.

T steps, d dimensions. Times run in sampling order, pure noise first.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.sampling.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class AffineChain:
    """A Gaussian chain of affine steps.

    Attributes:
        F: (T, d, d).
        g: (T, d).
        cov: Noise covariance of each step, (T, d, d); all zeros at deterministic steps.
        prior_mean: (d,).
        prior_cov: (d, d).
    """

    F: Tensor
    g: Tensor
    cov: Tensor
    prior_mean: Tensor
    prior_cov: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return self.F.shape[0]

    @property
    def stochastic(self) -> list[bool]:
        """Which steps have noise, and so a density and a KL."""
        return [bool((cov != 0).any()) for cov in self.cov]


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """-1/2 x'Px + q'x + c; a reward, or a value function.

    Attributes:
        P: (d, d), symmetric.
        q: (d,).
        c: Scalar.
    """

    P: Tensor
    q: Tensor
    c: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Values (B,) at states (B, d)."""
        return -0.5 * torch.einsum("bi,ij,bj->b", x, self.P.to(x), x) + x @ self.q.to(x) + self.c.to(x)

    def expectation(self, mean: Tensor, cov: Tensor) -> Tensor:
        """Its mean under N(mean, cov), a scalar."""
        return -0.5 * (mean @ self.P @ mean + (self.P * cov).sum()) + self.q @ mean + self.c


def quadratic(P: Tensor, q: Tensor, c: float = 0.0) -> Quadratic:
    """A quadratic reward in float64 from curvature (d, d) and slope (d,)."""
    return Quadratic(P=P.double(), q=q.double(), c=torch.tensor(c, dtype=torch.float64))


def gaussian_data_chain(mean: Tensor, cov: Tensor, schedule: Schedule) -> AffineChain:
    """The chain of a sampler on data N(mean, cov) with the exact denoiser.

    The exact prediction is x0_hat = E[x0 | x] = mean + a cov (a^2 cov + s^2 I)^(-1) (x - a mean), and the step's mean
    a' x0_hat + direction (x - a x0_hat) / s.

    Args:
        mean: (d,).
        cov: (d, d), positive definite.
        schedule: Coefficients of the sampler, T steps.
    """
    eye = torch.eye(len(mean), dtype=torch.float64)
    mean, cov = mean.double(), cov.double()
    F, g = [], []
    for k in range(schedule.num_steps):
        a, s, a_next, direction = (
            float(values[k]) for values in (schedule.a, schedule.s, schedule.a_next, schedule.direction)
        )
        gain = a * torch.linalg.solve(a**2 * cov + s**2 * eye, cov)  # symmetric factors commute
        on_x0 = a_next - direction * a / s
        F.append(on_x0 * gain + direction / s * eye)
        g.append(on_x0 * (mean - a * gain @ mean))
    return AffineChain(
        F=torch.stack(F),
        g=torch.stack(g),
        cov=schedule.std.double().cpu().square()[:, None, None] * eye,
        prior_mean=torch.zeros_like(mean),
        prior_cov=eye,
    )


def controlled(reference: AffineChain, gain: Tensor, shift: Tensor) -> AffineChain:
    """The chain whose means are moved by std_k (gain_k x + shift_k), i.e. with the control u_k(x) = gain_k x + shift_k.

    Valid where the noise of every step is isotropic. KL_k is then ||u_k||^2 / 2.

    Args:
        reference: T steps.
        gain: (T, d, d).
        shift: (T, d).
    """
    return moved(reference, reference.cov.diagonal(dim1=1, dim2=2)[:, 0].sqrt(), gain, shift)


def moved(reference: AffineChain, scale: Tensor, gain: Tensor, shift: Tensor) -> AffineChain:
    """The chain whose means are moved by scale_k (gain_k x + shift_k).

    Args:
        reference: T steps.
        scale: (T,).
        gain: (T, d, d).
        shift: (T, d).
    """
    return replace(reference, F=reference.F + scale[:, None, None] * gain, g=reference.g + scale[:, None] * shift)


def marginals(chain: AffineChain) -> tuple[list[Tensor], list[Tensor]]:
    """Means (d,) and covariances (d, d) of x_0 .. x_T."""
    means, covs = [chain.prior_mean], [chain.prior_cov]
    for F, g, cov in zip(chain.F, chain.g, chain.cov, strict=True):
        means.append(F @ means[-1] + g)
        covs.append(F @ covs[-1] @ F.T + cov)
    return means, covs


def marginal_entropies(chain: AffineChain) -> Tensor:
    """Differential entropies of x_0 .. x_T, (T+1,) nats."""
    _, covs = marginals(chain)
    return 0.5 * torch.stack([torch.logdet(2 * math.pi * math.e * cov) for cov in covs])


def step_kls(chain: AffineChain, reference: AffineChain, *, visited: AffineChain | None = None) -> Tensor:
    """E KL_k of every step, (T,) nats; the noise covariances may differ.

    KL(N(m, C) || N(m', C')) = 1/2 [ |m - m'|^2_{C'^-1} + tr(C'^-1 C) - d - log det C / det C' ].

    Args:
        chain: Whose steps are measured.
        reference: Against which.
        visited: The chain whose states the mean is over; default the first, whose path KL is then the sum.
    """
    means, covs = marginals(visited or chain)
    kls = []
    for k, noisy in enumerate(reference.stochastic):
        if not noisy:
            kls.append(chain.prior_mean.new_zeros(()))
            continue
        precision = torch.linalg.inv(reference.cov[k])
        dF, dg = chain.F[k] - reference.F[k], chain.g[k] - reference.g[k]
        difference = dF @ means[k] + dg
        spread = dF @ covs[k] @ dF.T + chain.cov[k] - reference.cov[k]
        kl = difference @ precision @ difference + (precision * spread).sum()
        if not torch.equal(chain.cov[k], reference.cov[k]):
            kl = kl - torch.logdet(chain.cov[k]) + torch.logdet(reference.cov[k])
        kls.append(0.5 * kl)
    return torch.stack(kls)


def objective(chain: AffineChain, reference: AffineChain, reward: Quadratic, alpha: float) -> Tensor:
    """J exactly, a scalar, differentiable in the chain's coefficients."""
    means, covs = marginals(chain)
    return reward.expectation(means[-1], covs[-1]) - alpha * step_kls(chain, reference).sum()


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The solution of a chain problem.

    Attributes:
        chain: The optimal policy.
        values: Value functions at x_0 .. x_T: what is still to be earned from there under the optimum; T+1 entries.
    """

    chain: AffineChain
    values: tuple[Quadratic, ...]

    @property
    def objective(self) -> float:
        """J of the optimum: the mean of the first value function under the prior."""
        return float(self.values[0].expectation(self.chain.prior_mean, self.chain.prior_cov))


def optimum(reference: AffineChain, reward: Quadratic, alpha: float, *, free_covariance: bool = False) -> Optimum:
    """Maximises J by backward recursion.

    With the value V(y) = -1/2 y'Py + q'y + c after a step of reference mean m and covariance C, the best mean is
    m + (C^-1 alpha + P)^-1 (q - P m). Its covariance is C (the sampler's, `free_covariance=False`), or, if it may be
    chosen too, (C^-1 + P/alpha)^-1; then the kernel is the reference's tilted by exp(V/alpha), the chain has the law of
    p_ref(path) exp(r/alpha) given x_0, and `values` are the soft values alpha log E_ref[exp(r/alpha) | x_k].

    Args:
        reference: The pretrained chain.
        reward: Earned at x_T.
        alpha: Reward units per nat, positive.
        free_covariance: Whether the noise covariances are chosen as well.

    Raises:
        ValueError: alpha is not positive, or the reward grows too fast for the maximum to exist.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}: without a KL term the optimum need not exist")
    value = reward
    values, F_best, g_best, cov_best = [value], [], [], []
    stochastic = reference.stochastic
    for k in reversed(range(reference.num_steps)):
        F, g, C = reference.F[k], reference.g[k], reference.cov[k]
        P, q, c = value.P, value.q, value.c
        if stochastic[k]:
            weight = alpha * torch.linalg.inv(C)
            total = weight + P
            if not bool((torch.linalg.eigvalsh(total) > 0).all()):
                raise ValueError(
                    f"step {k}: alpha C^-1 + P is not positive definite: the reward grows faster than alpha = {alpha} "
                    "nats can hold back; raise alpha or lower the reward's curvature"
                )
            pull = torch.linalg.inv(total)
            move = torch.eye(len(g), dtype=P.dtype) - pull @ P  # best mean = move m + pull q
            F, g = move @ F, move @ g + pull @ q
            if free_covariance:
                c = c + 0.5 * q @ pull @ q + 0.5 * alpha * (torch.logdet(weight) - torch.logdet(total))
                C = alpha * pull
            else:
                c = c + 0.5 * q @ pull @ q - 0.5 * (P * C).sum()
            P, q = weight @ pull @ P, weight @ pull @ q
        F_best.append(F)
        g_best.append(g)
        cov_best.append(C)
        value = _pull_back(Quadratic(P=0.5 * (P + P.T), q=q, c=c), reference.F[k], reference.g[k])
        values.append(value)
    chain = replace(
        reference, F=torch.stack(F_best[::-1]), g=torch.stack(g_best[::-1]), cov=torch.stack(cov_best[::-1])
    )
    return Optimum(chain=chain, values=tuple(values[::-1]))


def _pull_back(value: Quadratic, F: Tensor, g: Tensor) -> Quadratic:
    """The function value(F x + g) of x."""
    return Quadratic(
        P=F.T @ value.P @ F, q=F.T @ (value.q - value.P @ g), c=value.c + value.q @ g - 0.5 * g @ value.P @ g
    )


def tilted_terminal(reference: AffineChain, reward: Quadratic, alpha: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of p_ref(x_T) exp(r(x_T)/alpha) / Z, p_ref the reference chain's own terminal law."""
    means, covs = marginals(reference)
    precision = torch.linalg.inv(covs[-1])
    cov = torch.linalg.inv(precision + reward.P / alpha)
    return cov @ (precision @ means[-1] + reward.q / alpha), cov


def gaussian_kl(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """KL(N(mean, cov) || N(other_mean, other_cov)) in nats."""
    precision = torch.linalg.inv(other_cov)
    difference = mean - other_mean
    ratio = precision @ cov
    return 0.5 * float(difference @ precision @ difference + ratio.trace() - len(mean) - torch.logdet(ratio))


def initial_value_bias(reference: AffineChain, reward: Quadratic, alpha: float) -> tuple[float, float]:
    """How far the optimum's terminal law is from p_ref(x_T) exp(r(x_T)/alpha) / Z, in nats.

    The optimal path law is the reference's tilted by exp(r/alpha) given x_0, but x_0 keeps its prior. The terminal law
    is then the tilted one only if x_T does not depend on x_0: DDIM with eta near 1 and enough steps.

    Returns:
        KL(terminal || tilted) of the optimum whose noise is free, and of the one with the sampler's noise.
    """
    target = tilted_terminal(reference, reward, alpha)
    laws = []
    for free in (True, False):
        means, covs = marginals(optimum(reference, reward, alpha, free_covariance=free).chain)
        laws.append(gaussian_kl(means[-1], covs[-1], *target))
    return laws[0], laws[1]


def relative_gap(value: float, best: float, start: float) -> float:
    """(J* - J) / (J* - J_ref): 0 at the optimum, 1 where training started."""
    if not math.isfinite(best - start) or best <= start:
        raise ValueError(f"the optimum {best} must be above the start {start}")
    return (best - value) / (best - start)
