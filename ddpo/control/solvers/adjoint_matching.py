"""Adjoint matching: stochastic control as a regression on lean adjoint states.

Along paths of the current control u, held fixed, the lean adjoint runs backwards (Domingo-Enrich et al.,
arXiv:2409.08861)

    da/dt = -(grad b)' a - grad f,    a(T) = grad g(X_T),       loss  E int |u(X_t, t) + sigma' a_t|^2 dt

and the only fixed point of "regress u on -sigma' a" is u* = -sigma' grad V. No gradient passes through the paths, and
none of the terms of the full adjoint that vanish at the optimum is carried along.

Deviation from the paper, on by default: at the optimum grad V(X_t, t) is a itself up to a martingale, since d grad V
= -((grad b)' grad V + grad f) dt + (hess V) sigma dW and (hess V) sigma = -(grad u*)'. With the current control's
Jacobian in place of the optimal one, the backward step becomes

    a_k = a_{k+1} + [(grad b)' a + grad f] dt + (grad u_k)' dW_k

The last term has mean zero given X_k whatever u is, so the regression has the same solution; but at the optimum its
targets are free of noise, which the plain targets never are. `control_variate=False` gives the paper's.

Paths and adjoints use Heun's averages, of order 2 in the step. B paths, K steps, d dimensions, float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddpo.control.problems.soc_problems import SOCProblem

_MEMORY = 0.8  # largest weight of all earlier batches against the newest in SeparableControl.regress


def _chebyshev(t: Tensor, degree: int, horizon: float) -> Tensor:
    """Chebyshev polynomials of degrees 0 to `degree` on [0, horizon] at times (...), (..., degree + 1)."""
    angle = torch.arccos((2 * t / horizon - 1).clamp(-1, 1))
    return torch.cos(angle[..., None] * torch.arange(degree + 1, dtype=t.dtype))


class AffineControl(nn.Module):
    """u(x, t) = G(t) x + h(t), with G and h Chebyshev polynomials in t.

    Args:
        dim: d.
        degree: Of the polynomials.
        horizon: T.
    """

    def __init__(self, dim: int, *, degree: int = 4, horizon: float = 1.0) -> None:
        super().__init__()
        self.horizon, self.degree = horizon, degree
        self.gain = nn.Parameter(torch.zeros(degree + 1, dim, dim, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(degree + 1, dim, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """u, (B, d), of states (B, d) and times, a scalar or (B,)."""
        basis = _chebyshev(t, self.degree, self.horizon)
        if t.ndim == 0:
            return x @ torch.einsum("j,jio->io", basis, self.gain) + basis @ self.shift
        spread = torch.einsum("bi,jio->jbo", x, self.gain)
        return torch.einsum("bj,jbo->bo", basis, spread) + basis @ self.shift

    def regress(self, x: Tensor, t: Tensor, targets: Tensor, *, ridge: float = 1e-9) -> None:
        """Sets the parameters to the least-squares fit of targets (N, d) at states (N, d) and times (N,).

        `ridge`, relative to the mean square of the features, holds what the data do not determine near its old value.
        """
        inputs = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        features = (_chebyshev(t, self.degree, self.horizon)[:, :, None] * inputs[:, None]).flatten(1)
        with torch.no_grad():
            old = torch.cat([self.gain, self.shift[:, None]], 1).flatten(0, 1)
            gram = features.T @ features
            gram.diagonal().add_(ridge * float(gram.trace()) / len(gram))
            new = old + torch.linalg.solve(gram, features.T @ (targets - features @ old))
            new = new.reshape(self.degree + 1, -1, x.shape[1])
            self.gain.copy_(new[:, :-1])
            self.shift.copy_(new[:, -1])


class SeparableControl(nn.Module):
    """u_i(x, t) = c_i . (Chebyshev in t) x (Gaussian bumps in x_i): for problems that fall apart into coordinates.

    Args:
        dim: d.
        degree: Of the polynomials in t.
        num_bumps: Per coordinate, on |x_i| <= 1.8, of width 1.1 times their distance; zero far beyond.
        horizon: T.
    """

    def __init__(self, dim: int, *, degree: int = 10, num_bumps: int = 9, horizon: float = 1.0) -> None:
        super().__init__()
        self.horizon, self.degree, self.num_batches = horizon, degree, 0
        self.centres = torch.linspace(-1.8, 1.8, num_bumps, dtype=torch.float64)
        size = (degree + 1) * num_bumps
        self.weight = nn.Parameter(torch.zeros(dim, size, dtype=torch.float64))
        self.gram, self.moment = torch.zeros(dim, size, size).double(), torch.zeros(dim, size).double()

    def _features(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, d, size)."""
        width = 1.1 * (self.centres[1] - self.centres[0])
        bumps = torch.exp(-0.5 * ((x[..., None] - self.centres) / width) ** 2)
        basis = _chebyshev(t, self.degree, self.horizon).expand(x.shape[0], -1)
        return (basis[:, None, :, None] * bumps[:, :, None]).flatten(2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """u, (B, d), of states (B, d) and times, a scalar or (B,)."""
        return torch.einsum("bdf,df->bd", self._features(x, t), self.weight)

    def regress(self, x: Tensor, t: Tensor, targets: Tensor, *, ridge: float = 1e-2) -> None:
        """The ridge regression on this and earlier batches; at a ridge of 1e-3 it diverged in one of three runs."""
        keep = min(self.num_batches / (self.num_batches + 1), _MEMORY)
        with torch.no_grad():
            features = self._features(x, t)
            gram = torch.einsum("bdf,bdg->dfg", features, features) / len(x)
            self.gram = keep * self.gram + (1 - keep) * gram
            self.moment = keep * self.moment + (1 - keep) * torch.einsum("bdf,bd->df", features, targets) / len(x)
            held = ridge * self.gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(gram.shape[1]).double()
            self.weight.copy_(torch.linalg.solve(self.gram + held, self.moment))
        self.num_batches += 1


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Paths of a control.

    Attributes:
        states: (K + 1, B, d).
        noise: Brownian increments, (K, B, d).
        times: (K + 1,).
    """

    states: Tensor
    noise: Tensor
    times: Tensor


def sample_paths(
    problem: SOCProblem,
    control: Callable[[Tensor, Tensor], Tensor],
    *,
    num_paths: int,
    num_steps: int,
    generator: torch.Generator,
) -> Paths:
    """Simulates a control from the problem's start with Heun's drift; no gradients."""
    x, dt = problem.start.expand(num_paths, -1), problem.horizon / num_steps
    times = torch.linspace(0, problem.horizon, num_steps + 1, dtype=x.dtype)
    noise = math.sqrt(dt) * torch.randn(num_steps, *x.shape, dtype=x.dtype, generator=generator)
    states = [x]
    with torch.no_grad():
        for k in range(num_steps):
            shock = noise[k] @ problem.sigma.T
            slope = problem.drift(x) + control(x, times[k]) @ problem.sigma.T
            predicted = x + slope * dt + shock
            end = problem.drift(predicted) + control(predicted, times[k + 1]) @ problem.sigma.T
            x = x + 0.5 * dt * (slope + end) + shock
            states.append(x)
    return Paths(states=torch.stack(states), noise=noise, times=times)


def lean_adjoints(
    problem: SOCProblem, control: Callable[[Tensor, Tensor], Tensor], paths: Paths, *, control_variate: bool = True
) -> Tensor:
    """The adjoint state at the beginning of every step, (K, B, d), detached."""
    num_steps, num_paths, dim = paths.noise.shape
    dt = problem.horizon / num_steps
    martingale = torch.zeros_like(paths.noise)
    if control_variate:
        flat = paths.states[:-1].reshape(-1, dim).requires_grad_()
        times = paths.times[:-1].repeat_interleave(num_paths)
        along_noise = (control(flat, times) * paths.noise.reshape(-1, dim)).sum()
        martingale = torch.autograd.grad(along_noise, flat)[0].reshape(martingale.shape)

    def slope(x: Tensor, adjoint: Tensor) -> Tensor:
        """(grad b)' a + grad f."""
        leaf = x.detach().requires_grad_()
        total = (problem.drift(leaf) * adjoint).sum() + problem.running_cost(leaf).sum()
        return torch.autograd.grad(total, leaf)[0]

    final = paths.states[-1].detach().requires_grad_()
    adjoint = torch.autograd.grad(problem.terminal_cost(final).sum(), final)[0]
    adjoints = []
    for k in reversed(range(num_steps)):
        end = slope(paths.states[k + 1], adjoint)
        begin = slope(paths.states[k], adjoint + dt * end + martingale[k])
        adjoint = adjoint + 0.5 * dt * (begin + end) + martingale[k]
        adjoints.append(adjoint)
    return torch.stack(adjoints[::-1])


@dataclass(frozen=True, kw_only=True)
class Regression:
    """One batch of adjoint matching.

    Attributes:
        states: (N, d).
        times: (N,).
        targets: -sigma' a, (N, d).
    """

    states: Tensor
    times: Tensor
    targets: Tensor

    def loss(self, control: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean of |u - target|^2, a scalar."""
        return (control(self.states, self.times) - self.targets).square().sum(1).mean()


def matching_batch(
    problem: SOCProblem,
    control: Callable[[Tensor, Tensor], Tensor],
    *,
    num_paths: int,
    generator: torch.Generator,
    num_steps: int | None = None,
    control_variate: bool = True,
) -> Regression:
    """What `control` should be regressed on, from fresh paths of its own; nothing carries gradients."""
    steps = num_steps or problem.num_steps
    paths = sample_paths(problem, control, num_paths=num_paths, num_steps=steps, generator=generator)
    adjoints = lean_adjoints(problem, control, paths, control_variate=control_variate)
    return Regression(
        states=paths.states[:-1].flatten(0, 1).detach(),
        times=paths.times[:-1].repeat_interleave(num_paths),
        targets=-adjoints.flatten(0, 1) @ problem.sigma,
    )


def adjoint_regression(
    problem: SOCProblem,
    control: AffineControl | SeparableControl,
    *,
    generator: torch.Generator,
    num_iterations: int = 10,
    num_paths: int = 256,
    num_steps: int | None = None,
    control_variate: bool = True,
) -> list[float]:
    """Adjoint matching of a control linear in its parameters, each regression solved; returns the losses before each.

    Where u* is affine in x an AffineControl converges in a handful of iterations.
    """
    losses = []
    for _ in range(num_iterations):
        batch = matching_batch(
            problem,
            control,
            num_paths=num_paths,
            generator=generator,
            num_steps=num_steps,
            control_variate=control_variate,
        )
        losses.append(float(batch.loss(control).detach()))
        control.regress(batch.states, batch.times, batch.targets)
    return losses


def adjoint_matching(
    problem: SOCProblem,
    control: nn.Module,
    *,
    generator: torch.Generator,
    num_iterations: int = 300,
    num_paths: int = 64,
    num_steps: int | None = None,
    learning_rate: float = 1e-2,
    control_variate: bool = True,
) -> list[float]:
    """Trains `control` in place by Adam with a cosine-decayed learning rate; returns the loss of every iteration.

    Args:
        problem: What to solve.
        control: u, a module of (x, t), float64, t a scalar or (B,).
        generator: Of the paths.
        num_iterations: Gradient steps, each on fresh paths.
        num_paths: B.
        num_steps: K; the problem's own by default.
        learning_rate: At first; it falls to zero.
        control_variate: Take the noise of the targets off (see the module).
    """
    optimizer, losses = torch.optim.Adam(control.parameters(), lr=learning_rate), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_iterations)
    for _ in range(num_iterations):
        loss = matching_batch(
            problem,
            control,
            num_paths=num_paths,
            generator=generator,
            num_steps=num_steps,
            control_variate=control_variate,
        ).loss(control)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
