"""The exact side of the fine-tuning problem, held against itself by independent routes and against diffusers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import (
    gaussian_data_chain,
    initial_value_bias,
    marginals,
    optimum,
    quadratic,
    step_kls,
)
from ddpo.control.diffusion.grid_chain import GridChain, make_grid
from ddpo.control.diffusion.toy_pipeline import toy_schedule
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.sampling.samplers import SamplerConfig

# N(1, .5^2), r = -x^2 - x, alpha = .5: KL(terminal law || p_ref exp(r/alpha)/Z) in nats, of the tilted optimum and of
# the one with the sampler's noise, derived and computed by a separate program.
BIAS = {
    (10, 0.7): (5.8e-4, 1.7e-3),
    (10, 0.5): (0.031, 0.031),
    (50, 1.0): (1.0e-10, 3.8e-4),
    (50, 0.5): (4.0e-3, 4.1e-3),
    (50, 0.2): (0.59, 0.59),
}


def random_head(dims: int = 4, num_steps: int = 10, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Weights of an affine head away from zero, (T, d, d) and (T, d) float64."""
    generator = torch.Generator().manual_seed(seed)
    gain = 0.2 * torch.randn(num_steps, dims, dims, generator=generator, dtype=torch.float64)
    return gain, 0.3 * torch.randn(num_steps, dims, generator=generator, dtype=torch.float64)


def check_affine_steps() -> Iterator[Measurement]:
    """The affine chain against `DDIMScheduler.step` with the exact prediction."""
    problem = toy_problem()
    scheduler, schedule = toy_schedule(problem.sampler)
    chain = problem.reference
    eye = torch.eye(4, dtype=torch.float64)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = 0.0
    for k, t in enumerate(scheduler.timesteps):
        abar = scheduler.alphas_cumprod[t].double()
        spread = abar * problem.cov + (1 - abar) * eye
        x0 = problem.mean + (x - abar.sqrt() * problem.mean) @ torch.linalg.solve(spread, abar.sqrt() * problem.cov)
        noise = torch.zeros_like(x)
        stock = scheduler.step(x0, t, x, eta=problem.sampler.eta, variance_noise=noise, return_dict=False)[0]
        error = max(error, float((stock - (x @ chain.F[k].T + chain.g[k])).abs().max()))
    # diffusers keeps alphas_cumprod in float32, which bounds how closely its own coefficients can be followed.
    yield Measurement(name="mean of every step, max", exact="DDIMScheduler.step", obtained="affine chain",
                      error=error, tolerance=1e-6)  # fmt: skip


def check_optimum() -> Iterator[Measurement]:
    """The Riccati recursion's policy earns what its value function promises, and no change of it earns more."""
    problem = toy_problem()
    best = problem.optimum
    std = problem.reference.cov[:, 0, 0].sqrt()[:-1]
    gain, shift = torch.zeros(10, 4, 4, dtype=torch.float64), torch.zeros(10, 4, dtype=torch.float64)
    gain[:-1] = (best.chain.F - problem.reference.F)[:-1] / std[:, None, None]
    shift[:-1] = (best.chain.g - problem.reference.g)[:-1] / std[:, None]
    gain.requires_grad_()
    shift.requires_grad_()
    value = problem.value(gain, shift)
    slopes = torch.autograd.grad(value, (gain, shift))
    yield Measurement(name="J of the optimal policy", exact=best.objective, obtained=float(value.detach()),
                      error=abs(float(value.detach()) - best.objective), tolerance=1e-10)  # fmt: skip
    worst = max(float(slope.abs().max()) for slope in slopes)
    yield Measurement(name="largest slope of J there", exact=0.0, obtained=worst, error=worst, tolerance=1e-10)


def check_verification_identity() -> Iterator[Measurement]:
    """J(pi) = E V_soft(x_0) - alpha sum_k E KL(pi_k || pi*_k) for a policy far from the optimum."""
    problem = toy_problem()
    soft = optimum(problem.reference, problem.reward, problem.alpha, free_covariance=True)
    gain, shift = random_head()
    chain = problem.chain(gain, shift)
    lower = soft.objective - problem.alpha * float(step_kls(chain, soft.chain).sum())
    value = float(problem.value(gain, shift))
    yield Measurement(name="J of a random policy", exact=lower, obtained=value, error=abs(value - lower),
                      tolerance=1e-10)  # fmt: skip


def check_initial_value_bias() -> Iterator[Measurement]:
    """With eta < 1 or few steps the optimum does not have the tilted law p_ref exp(r/alpha) / Z, by these amounts."""
    reward = quadratic(torch.tensor([[2.0]]), torch.tensor([-1.0]))
    for (steps, eta), (tilted, fixed) in BIAS.items():
        schedule = toy_schedule(SamplerConfig(num_steps=steps, eta=eta, guidance_scale=1.0))[1]
        reference = gaussian_data_chain(torch.tensor([1.0]), torch.tensor([[0.25]]), schedule)
        obtained = initial_value_bias(reference, reward, 0.5)
        error = max(abs(obtained[0] / tilted - 1), abs(obtained[1] / fixed - 1))
        yield Measurement(name=f"T {steps}, eta {eta:g}: tilted / fixed (nats)", exact=f"{tilted:.2g} / {fixed:.2g}",
                          obtained=f"{obtained[0]:.2g} / {obtained[1]:.2g}", error=error, tolerance=0.02)  # fmt: skip


def check_grid() -> Iterator[Measurement]:
    """Dynamic programming on a grid, which takes any network, gives the same optima where Riccati knows them."""
    reward = quadratic(torch.tensor([[2.0]]), torch.tensor([-1.0]))
    schedule = toy_schedule(SamplerConfig(num_steps=10, guidance_scale=1.0))[1]
    reference = gaussian_data_chain(torch.tensor([1.0]), torch.tensor([[0.25]]), schedule)
    grid = GridChain(
        grid=make_grid(schedule.std),
        std=schedule.std,
        reference=lambda k, x: reference.F[k, 0, 0] * x + reference.g[k, 0],
        reward=lambda x: reward(x[:, None]),
        alpha=0.5,
    )
    for name, value, free in (("sampler's noise", grid.optimum()[0], False), ("free noise", grid.soft_optimum(), True)):
        exact = optimum(reference, reward, 0.5, free_covariance=free).objective
        yield Measurement(name=f"J*, {name}", exact=exact, obtained=value, error=abs(value - exact), tolerance=1e-10)


def check_terminal_law() -> Iterator[Measurement]:
    """With more steps, stochastic samplers with the exact score end in the data's law."""
    mean, cov = torch.tensor([1.0], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64)
    for sampler in (
        SamplerConfig(kind="ddim", num_steps=500, eta=1.0, guidance_scale=1.0),
        SamplerConfig(kind="flow_sde", num_steps=500, eta=0.7, guidance_scale=1.0),
    ):
        schedule = toy_schedule(sampler)[1]
        means, covs = marginals(gaussian_data_chain(mean, cov, schedule))
        error = max(abs(float(means[-1]) - 1.0), abs(float(covs[-1].sqrt()) - 0.5))
        yield Measurement(name=f"{sampler.kind}, 500 steps: mean, std", exact="1, 0.5",
                          obtained=f"{float(means[-1]):.4f}, {float(covs[-1].sqrt()):.4f}", error=error,
                          tolerance=0.02)  # fmt: skip


CHECKS = (
    Check(name="affine steps", group="chain", level="fast", run=check_affine_steps,
          claim="A DDIM step with the exact score of Gaussian data is the affine step that the recursion solves."),
    Check(name="optimum", group="chain", level="fast", run=check_optimum,
          claim="The backward Riccati recursion gives the optimum of E[r] - alpha sum KL."),
    Check(name="verification identity", group="chain", level="fast", run=check_verification_identity,
          claim="What a policy lacks of the soft value is alpha times its KL to the tilted optimum, exactly."),
    Check(name="initial-value bias", group="chain", level="fast", run=check_initial_value_bias,
          claim="The optimum has the tilted law only when the sampler forgets its initial noise: use eta = 1."),
    Check(name="grid", group="chain", level="fast", run=check_grid,
          claim="Dynamic programming on a grid agrees with the Riccati recursion."),
    Check(name="terminal law", group="chain", level="fast", run=check_terminal_law,
          claim="DDIM at eta 1 and the flow SDE sample the data's law as steps grow."),
)  # fmt: skip
