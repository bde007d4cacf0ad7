"""Regression on clean samples: its gradients, and what each method finds on data whose answer is known.

The gradients of the objective, through a policy and its conversion of predictions, are held to finite differences of
the losses as they are published, written out again here. What the methods find is the minimiser of their own losses
under exact posteriors (`ddpo.control.diffusion.regression_minimiser`), held to closed forms and to tilted laws.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.regression_minimiser import Law, States, minimiser
from ddpo.control.diffusion.toy_pipeline import head_scale
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.objectives import Models
from ddpo.objectives.clean_sample import CleanSampleConfig, CleanSampleRegression, NoisedSamples
from ddpo.sampling.samplers import SamplerConfig
from ddpo.sampling.schedule import coefficient

FLOW = SamplerConfig(kind="flow_sde", num_steps=5, eta=0.7, guidance_scale=1.0)
STATES = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
HALF = States(x=STATES, a=0.5, s=0.5)


# ---- the losses as they are published, of one sample -----------------------------------------------------------------

Published = Callable[[Tensor], Tensor]


def ram(v: Tensor, *, data: Tensor, frozen: Tensor, advantage: float, multiplier: float) -> Tensor:
    """The mean of |v - (v_ref + m A (v* - v_old))|^2."""
    return (v - (frozen + multiplier * advantage * (data - frozen))).square().mean()


def nft(v: Tensor, *, data: Tensor, frozen: Tensor, advantage: float, beta: float) -> Tensor:
    """(5 / beta) mean [r |v+ - v*|^2 + (1 - r) |v- - v*|^2], v+- = v_old +- beta (v - v_old), r = 1/2 + A / 10."""
    r, move = 0.5 + advantage / 10, beta * (v - frozen)
    both = r * (frozen + move - data).square() + (1 - r) * (frozen - move - data).square()
    return 5 / beta * both.mean()


def nft_code(v: Tensor, *, x: Tensor, t: float, z: Tensor, frozen: Tensor, advantage: float, beta: float) -> Tensor:
    """(5 / beta) [r |x+ - z|^2 / w+ + (1 - r) |x- - z|^2 / w-], x+- = x - t v+-, w+- = mean |x+- - z| held fixed."""
    r, total = 0.5 + advantage / 10, torch.zeros((), dtype=torch.float64)
    for sign, share in ((1, r), (-1, 1 - r)):
        error = x - t * (frozen + sign * beta * (v - frozen)) - z
        width = (x - t * frozen - z).abs().mean()  # at v = v_old, where the gradient is taken
        total = total + share * error.square().mean() / width
    return 5 / beta * total


def awm(v: Tensor, *, data: Tensor, frozen: Tensor, advantage: float) -> Tensor:
    """-(A / 5) exp(log p - log p_old), log p = -mean |v - v*|^2: its gradient where v = v_old."""
    log_ratio = (frozen - data).square().mean() - (v - data).square().mean()
    return -advantage / 5 * torch.exp(log_ratio)


def central_differences(loss: Published, at: Tensor, *, width: float = 1e-5) -> Tensor:
    """The gradient of a loss by its values alone."""
    found = torch.empty_like(at)
    for i in range(len(at)):
        move = torch.zeros_like(at)
        move[i] = width
        found[i] = (loss(at + move) - loss(at - move)) / (2 * width)
    return found


def check_gradients() -> Iterator[Measurement]:
    """The gradient by the velocity, where the policy is the old and the pretrained one."""
    advantage, k, beta = -1.3, 2, 0.1
    z, eps = torch.tensor([0.4, -0.9]), torch.tensor([1.1, 0.3])
    problem = toy_problem(2, sampler=FLOW)
    policy = problem.policy()
    t = float(policy.schedule.s[k])
    x = ((1 - t) * z + t * eps).double()
    with torch.no_grad():
        condition, steps = policy.encode([""]), torch.tensor([k])
        prediction = policy.predict(steps, x[None].float(), condition)
    v, data = (prediction.eps - prediction.x0)[0].double(), (eps - z).double()
    at: dict[str, Tensor] = {"data": data, "frozen": v}
    published: dict[str, tuple[CleanSampleConfig, Published]] = {
        "RAM": (CleanSampleConfig(preset="ram"), lambda v: ram(v, **at, advantage=advantage, multiplier=100.0)),
        "Tilt Matching": (
            CleanSampleConfig(preset="tilt_matching"),
            lambda v: ram(v, **at, advantage=advantage, multiplier=0.1),
        ),
        "NFT, beta 1": (
            CleanSampleConfig(preset="nft", reference_weight=0.0),
            lambda v: nft(v, **at, advantage=advantage, beta=1.0) / 5,
        ),
        "NFT, beta .1": (
            CleanSampleConfig(preset="nft", target="contrast", multiplier=2.0),
            lambda v: nft(v, **at, advantage=advantage, beta=beta),
        ),
        "NFT's code, beta .1": (
            CleanSampleConfig(preset="nft_published", multiplier=2.0),
            lambda v: nft_code(v, x=x, t=t, z=z.double(), frozen=at["frozen"], advantage=advantage, beta=beta),
        ),
        "AWM": (CleanSampleConfig(preset="awm"), lambda v: awm(v, **at, advantage=advantage)),
    }
    for name, (config, loss) in published.items():
        batch = NoisedSamples(
            steps=steps,
            clean=z[None],
            eps=eps[None],
            weights=torch.tensor([advantage]),
            condition=condition,
        )
        old = {key: value.detach().clone() for key, value in policy.trainable().items()}
        objective = config.build()
        assert isinstance(objective, CleanSampleRegression)
        (found,) = objective.losses(Models(policy=policy, old=old), batch)
        (moved,) = torch.autograd.grad(found.value, policy.trainable()["head.shift"])
        on_velocity = -head_scale(policy.schedule, "affine")[k] / coefficient(policy.schedule.s, k, x[None])
        gradient, exact = moved[k].double() / on_velocity.flatten(), central_differences(loss, v)
        error = float((gradient - exact).norm() / exact.norm())
        yield Measurement(name=name, exact=_vector(exact), obtained=_vector(gradient), error=error, tolerance=1e-5)


def _vector(values: Tensor) -> str:
    return "(" + ", ".join(f"{float(value):.5g}" for value in values) + ")"


# ---- what the methods find -------------------------------------------------------------------------------------------


def grid(count: int = 1201, reach: float = 8.0) -> Tensor:
    """Points of the data."""
    return torch.linspace(-reach, reach, count, dtype=torch.float64)


def gaussian() -> Law:
    """N(0, 1)."""
    return Law(z=grid(), log_density=-0.5 * grid() ** 2)


def mixture() -> Law:
    """Two modes of unequal weight."""
    modes = [math.log(w / std) - 0.5 * ((grid() - m) / std) ** 2 for w, m, std in ((0.7, -1.0, 0.4), (0.3, 1.2, 0.3))]
    return Law(z=grid(), log_density=torch.logaddexp(*modes))


def line(values: Tensor) -> tuple[float, float]:
    """Slope and largest departure from a line through 0 of values at `STATES`."""
    slope = float(values @ STATES / STATES.square().sum())
    return slope, float((values - slope * STATES).abs().max())


def check_ram_residual() -> Iterator[Measurement]:
    """What RAM moves a policy by that is the KL optimum already, at t = 1/2; alpha 1."""
    knobs = replace(CleanSampleConfig(preset="ram").knobs, multiplier=1.0)
    z, reference = grid(), HALF.velocity(gaussian())
    for name, reward, slope in (("r = z", z, 0.0), ("r = -z^2 / 2", -0.5 * z**2, 4 / 9 - 2 / 3)):
        law = gaussian().tilted(reward)
        best = HALF.velocity(law)
        found = minimiser(knobs, HALF, law, reward - law.mean(reward), anchor=reference, old=best)
        own, rest = line(found - best)
        yield Measurement(
            name=f"{name}: slope", exact=slope, obtained=own, error=max(abs(own - slope), rest), tolerance=1e-8
        )


def check_tilt() -> Iterator[Measurement]:
    """The sum of Tilt Matching's steps from the pretrained model to the KL optimum at alpha 1, t = 1/2."""
    knobs = replace(CleanSampleConfig(preset="tilt_matching").knobs, multiplier=1.0)
    reward = -0.5 * grid() ** 2

    def step(data: Law, at: float) -> Tensor:
        law = data.tilted(at * reward)
        old = HALF.velocity(law)
        return minimiser(knobs, HALF, law, reward - law.mean(reward), anchor=old, old=old) - old

    def steps(data: Law, count: int) -> Tensor:
        return sum((step(data, i / count) / count for i in range(count)), start=torch.zeros_like(STATES))

    def extrapolated(data: Law) -> Tensor:
        """Richardson's limit of 4, 8, ... steps."""
        table = [steps(data, 4 * 2**i) for i in range(7)]
        for order in range(1, 7):
            table = [fine + (fine - coarse) / (2**order - 1) for coarse, fine in zip(table, table[1:], strict=False)]
        return table[0]

    own, rest = line(extrapolated(gaussian()))
    yield Measurement(
        name="infinitely many: slope", exact=2 / 3, obtained=own, error=max(abs(own - 2 / 3), rest), tolerance=1e-7
    )
    ten, twenty = (line(steps(gaussian(), count))[0] - 2 / 3 for count in (64, 128))
    yield Measurement(
        name="error of 64 steps over that of 128", exact=2.0, obtained=ten / twenty,
        error=abs(ten / twenty - 2), tolerance=0.02,
    )  # fmt: skip
    tilted = HALF.velocity(mixture().tilted(reward)) - HALF.velocity(mixture())
    error = float((extrapolated(mixture()) - tilted).abs().max() / tilted.abs().max())
    yield Measurement(
        name="the same on a mixture", exact="tilted law", obtained=f"off by {error:.1e}", error=error, tolerance=1e-5
    )


def check_nft() -> Iterator[Measurement]:
    """NFT's minimiser on a mixture: v_old + (2 / beta) E[r | x] (v+ - v_old), v+ of the law p r / E[r]."""
    data, bound = mixture(), 5.0
    reward = torch.tanh(grid())
    advantage = 3.0 * (reward - data.mean(reward))
    r, old = (1 + advantage / bound) / 2, HALF.velocity(data)
    good = HALF.velocity(data.tilted(r.log()))
    share = (HALF.posterior(data) * r).sum(1)
    for beta in (1.0, 0.1):
        exact = 2 / beta * share * (good - old)
        config = CleanSampleConfig(preset="nft", multiplier=1 / (bound * beta))
        for knobs in (config.knobs, replace(config.knobs, target="contrast")):
            found = minimiser(knobs, HALF, data, advantage, anchor=old, old=old) - old
            error = float((found - exact).abs().max() / exact.abs().max())
            yield Measurement(
                name=f"beta {beta:g}, {knobs.target}", exact="its theory", obtained=f"off by {error:.1e}",
                error=error, tolerance=1e-8,
            )  # fmt: skip


CHECKS = (
    Check(name="gradients", group="clean_sample", level="fast", run=check_gradients,
          claim="Where the policy is the old one, each method's gradient is that of its published loss."),
    Check(name="RAM at the KL optimum", group="clean_sample", level="fast", run=check_ram_residual,
          claim="RAM stays at the KL optimum of a linear reward on Gaussian data, and leaves that of a quadratic one."),
    Check(name="Tilt Matching", group="clean_sample", level="fast", run=check_tilt,
          claim="Small tilts of the policy itself add up to the KL optimum, with an error of the first order."),
    Check(name="NFT", group="clean_sample", level="fast", run=check_nft,
          claim="Without 1/w, NFT's minimiser is the mixture of laws that its theory says."),
)  # fmt: skip
