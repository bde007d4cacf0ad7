"""Natural gradients and trust regions: their metric against finite differences, their steps through the real trainer.

    gap = (J* - J) / (J* - J_ref)

after each update, of the weights that the trainer has saved (`trainers.verification.optimum`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.chain import relative_gap
from ddpo.control.diffusion.toy_heads import HeadKind
from ddpo.control.diffusion.toy_problem import mixture_problem, toy_problem
from ddpo.curvature import FisherProducts, Vector, dot
from ddpo.objectives import PolicyGradientConfig
from trainers.config.groups import OptimizerConfig
from trainers.epoch.trust_region import direction
from trainers.run_folder.folder import read_metrics
from trainers.verification.optimum import REINFORCE, Recipe, quiet_run

RADIUS = 0.02
REGION = OptimizerConfig(kind="natural_gradient", radius=RADIUS)
TRPO = OptimizerConfig(kind="trpo", radius=RADIUS)
RATES = (0.05, 0.1)
UPDATES, ADAMW_UPDATES, BAR = 8, 24, 0.05


def adamw(rate: float) -> OptimizerConfig:
    """AdamW as the trainer's other checks have it, at a constant rate."""
    return OptimizerConfig(learning_rate=rate, beta2=0.99, weight_decay=0.0, max_grad_norm=1e9)


@cache
def course(optimizer: OptimizerConfig, updates: int, head: HeadKind = "affine") -> tuple[list[float], list[float]]:
    """After each update: the share of the reachable J that is missing, and the KL of the update, nats.

    Where all steps share their weights it is J itself, whose optimum has no closed form.
    """
    problem = toy_problem(head=head)
    objective = PolicyGradientConfig(ratio="joint", updates_per_epoch=1)
    recipe = replace(REINFORCE, objective=objective, epochs=updates, optimizer=optimizer)
    values: list[float] = []
    with quiet_run(problem.policy(), problem, recipe, every_epochs=1) as run:
        nats = [float(row.get("optimizer/kl_nats", 0.0)) for row in read_metrics(run)]
        for folder in sorted((run / "checkpoints").glob("epoch_*")):
            weights = load_file(folder / "weights.safetensors")
            values.append(float(problem.value(weights["head.gain"], weights["head.shift"])))
            still = {name: torch.zeros_like(value) for name, value in weights.items()}
            if head == "affine":
                start = float(problem.value(still["head.gain"], still["head.shift"]))
                values[-1] = relative_gap(values[-1], problem.optimum.objective, start)
    return values, nats


def first(gaps: Sequence[float], bar: float) -> int | None:
    """Updates until a gap is below a bar; None for never."""
    return next((number for number, gap in enumerate(gaps, start=1) if gap <= bar), None)


def check_updates() -> Iterator[Measurement]:
    """How many updates it takes, against the better of two constant rates of AdamW."""
    best = {rate: course(adamw(rate), ADAMW_UPDATES)[0] for rate in RATES}
    fastest = min(first(gaps, BAR) or ADAMW_UPDATES + 1 for gaps in best.values())
    for name, options in (("natural gradient", REGION), ("TRPO", TRPO)):
        found = first(course(options, UPDATES)[0], BAR)
        yield Measurement(name=f"{name}: updates to gap {BAR}", exact=f"below AdamW's {fastest}", obtained=str(found),
                          error=(found or ADAMW_UPDATES) / fastest, tolerance=0.5)  # fmt: skip


def check_length() -> Iterator[Measurement]:
    """The KL of each update of a small network on bimodal data, measured after the step."""
    problem = mixture_problem()
    recipe = Recipe(objective=PolicyGradientConfig(ratio="joint", updates_per_epoch=1), epochs=4, optimizer=REGION)
    with quiet_run(problem.policy(), problem, recipe) as run:
        found = [float(row["optimizer/kl_nats"]) / RADIUS for row in read_metrics(run)]
    yield Measurement(name="KL after the step, in radii", exact=1.0, obtained=", ".join(f"{x:.3f}" for x in found),
                      error=max(abs(x - 1) for x in found), tolerance=0.2)  # fmt: skip


def curvature() -> tuple[float, float]:
    """V'Fv of a network on bimodal data, by finite differences and by a product."""
    policy = mixture_problem().policy()
    own, random = policy.trainable(), torch.Generator().manual_seed(0)

    def drawn(value: Tensor) -> Tensor:
        return torch.randn(value.shape, generator=random)

    @torch.no_grad()
    def shift(by: Vector, factor: float) -> None:
        for name, value in own.items():
            value.add_(by[name], alpha=factor)

    shift({name: drawn(value) for name, value in own.items()}, 0.1)  # away from where it starts
    x, steps, condition = (
        drawn(torch.empty(16, *policy.latent_shape)),
        torch.arange(16) % 5,
        policy.encode(["data"] * 16),
    )

    def whitened() -> Tensor:
        found = policy(steps, x, condition)
        return found.mean / found.std

    v = {name: drawn(value) for name, value in own.items()}
    product = dot(v, FisherProducts(policy=policy, tell=lambda text: None).product(whitened, v))
    size = 2e-2 / product**0.5
    nats = 0.0
    with torch.no_grad():
        before = policy(steps, x, condition)
        for factor in (size, -2 * size):
            shift(v, factor)
            nats += float(before.kl(policy(steps, x, condition)).double().sum())
    return nats / size**2, product


def check_products() -> Iterator[Measurement]:
    """To second order KL(theta || theta + v) + KL(theta || theta - v), of a nonlinear network."""
    differences, product = curvature()
    yield Measurement(name="v'Fv against finite differences of the KL", exact=differences, obtained=product,
                      error=abs(product / differences - 1), tolerance=0.01)  # fmt: skip


def check_scaling() -> Iterator[Measurement]:
    """Weights measured in other units: the change of the policy, on the range of a singular F."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(12, 8, generator=random, dtype=torch.float64)
    fisher, gradient = root @ root.T, root @ torch.randn(8, generator=random, dtype=torch.float64)
    scale = torch.exp(torch.randn(12, generator=random, dtype=torch.float64))

    def moved(s: Tensor, *, damping: float, diagonal: bool) -> Tensor:
        other = s[:, None] * fisher * s
        found, _ = direction(lambda v: {"w": other @ v["w"]}, {"w": s * gradient}, damping=damping, iterations=80,
                             metric={"w": other.diag()} if diagonal else None)  # fmt: skip
        return fisher @ (s * found.x["w"])

    def apart(one: Tensor, two: Tensor) -> float:
        return float((one / one.norm() - two / two.norm()).norm())

    same = torch.ones_like(scale)
    for name, damping, diagonal in (("damping 1e-9", 1e-9, False), ("damping 0.1 of diag F", 0.1, True)):
        error = apart(moved(same, damping=damping, diagonal=diagonal), moved(scale, damping=damping, diagonal=diagonal))
        yield Measurement(name=f"step in other units, {name}", exact="the same", obtained=f"apart {error:.1e}",
                          error=error, tolerance=1e-3)  # fmt: skip
    signs = apart(fisher @ gradient.sign(), fisher @ (scale * (scale * gradient).sign()))
    yield Measurement(name="AdamW's first step in other units", exact="another", obtained=f"apart {signs:.2f}",
                      error=0.1 / signs, tolerance=1.0)  # fmt: skip


CHECKS = (
    Check(name="Fisher products", group="natural gradient", level="fast", run=check_products,
          claim="Products are the curvature of the KL."),
    Check(name="units", group="natural gradient", level="fast", run=check_scaling,
          claim="A step does not depend on the units of single weights; AdamW's does."),
    Check(name="length", group="natural gradient", level="full", run=check_length,
          claim="The trainer's updates move a network's steps by the radius."),
    Check(name="updates", group="natural gradient", level="full", run=check_updates,
          claim="It comes near the closed-form optimum in at most half of AdamW's updates."),
)  # fmt: skip
