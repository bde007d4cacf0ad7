"""Fisher products against finite differences of the KL, on real denoisers; linear systems against a direct solver."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ddpo import Policy
from ddpo.curvature import FisherProducts, Vector, combined, conjugate_gradients, dot
from ddpo.sampling.gaussian import Gaussian
from ddpo.validation import UserError
from tests.ddpo.test_families import PROMPTS, make


def some_steps(policy: Policy) -> Callable[[], Gaussian]:
    """The distributions of two steps of random latents, at weights away from the start, where a LoRA has no effect."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in policy.trainable().values():
            value += 0.2 * torch.randn(value.shape, generator=random)
    x = torch.randn(2, *policy.latent_shape, generator=random)
    condition, steps = policy.encode(PROMPTS[:2]), torch.tensor([0, 1])
    return lambda: policy(steps, x, condition)


def random_direction(policy: Policy, seed: int) -> Vector:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=random) for name, value in policy.trainable().items()}


def whitened(distribution: Callable[[], Gaussian]) -> Callable[[], Tensor]:
    return lambda: (found := distribution()).mean / found.std


def kl_after(policy: Policy, distribution: Callable[[], Gaussian], change: Vector) -> float:
    """The summed KL of a change of the weights, which is then taken back."""
    own = policy.trainable()
    kept = {name: value.detach().clone() for name, value in own.items()}
    with torch.no_grad():
        before = distribution()
        for name, value in own.items():
            value += change[name]
        nats = float(before.kl(distribution()).double().sum())
        for name, value in own.items():
            value.copy_(kept[name])
    return nats


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_product_is_the_curvature_of_the_kl_by_forward_derivatives_and_by_two_backward_passes(
    family: str, checkpointing: bool
) -> None:
    policy = make(family)
    if checkpointing:
        policy.gradient_checkpointing()
    distribution, said = some_steps(policy), list[str]()
    v, w = random_direction(policy, 1), random_direction(policy, 2)
    found = FisherProducts(policy=policy, tell=said.append).product(whitened(distribution), v)
    other = FisherProducts(policy=policy, tell=said.append, reverse=True).product(whitened(distribution), v)
    assert dot(combined(found, -1, other), combined(found, -1, other)) < 1e-6 * dot(found, found)
    size = 3e-3 / dot(v, found) ** 0.5 * 10
    fd = [
        kl_after(policy, distribution, combined({n: size * x for n, x in v.items()}, sign * size, w))
        for sign in (1, -1)
    ]
    assert (fd[0] - fd[1]) / (2 * size**2) == pytest.approx(dot(w, found), rel=0.05, abs=0.02 * dot(v, found))
    straight = [kl_after(policy, distribution, {n: sign * size * x for n, x in v.items()}) for sign in (1, -1)]
    assert sum(straight) / size**2 == pytest.approx(dot(v, found), rel=0.01)
    if not checkpointing:
        assert said == [], "forward derivatives work"


def test_weights_are_where_they_were_after_a_product_that_fails() -> None:
    policy = make("sd1")
    own = dict(policy.trainable())
    values = {name: value.detach().clone() for name, value in own.items()}

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

    steps, said = whitened(some_steps(policy)), list[str]()
    values = {name: value.detach().clone() for name, value in own.items()}
    products = FisherProducts(policy=policy, tell=said.append)
    with pytest.raises(UserError, match="optimizer.kind must be adamw with this network"):
        products.product(lambda: Once.apply(steps()), random_direction(policy, 0))
    assert len(said) == 1 and said[0].startswith("Fisher products by two backward passes")
    assert all(policy.trainable()[name] is value for name, value in own.items())
    assert list(policy.trainable()) == list(own)
    assert all(torch.equal(value, values[name]) for name, value in own.items())


def system(size: int, rank: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(size)
    root = torch.randn(size, rank, generator=random, dtype=torch.float64)
    return root @ root.T, root @ torch.randn(rank, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("metric", [False, True])
def test_conjugate_gradients_solve_a_system_in_as_many_products_as_it_has_dimensions(metric: bool) -> None:
    matrix, b = system(12, 12)
    diagonal = {"w": matrix.diag()} if metric else None
    found = conjugate_gradients(
        lambda v: {"w": matrix @ v["w"]}, {"w": b}, metric=diagonal, iterations=40, tolerance=1e-10
    )
    assert torch.allclose(found.x["w"], torch.linalg.solve(matrix, b), rtol=1e-5)
    assert found.iterations <= 16 and found.residual < 1e-9


def test_of_a_singular_system_they_find_the_solution_without_a_part_in_the_null_space() -> None:
    matrix, b = system(12, 5)
    found = conjugate_gradients(lambda v: {"w": matrix @ v["w"]}, {"w": b}, iterations=12, tolerance=1e-10)
    assert torch.allclose(found.x["w"], torch.linalg.pinv(matrix) @ b, rtol=1e-5, atol=1e-9)


def test_stopped_early_they_go_up_and_say_what_is_left() -> None:
    matrix, b = system(30, 30)
    found = conjugate_gradients(lambda v: {"w": matrix @ v["w"]}, {"w": b}, iterations=3, tolerance=1e-10)
    assert found.iterations == 3 and float(found.x["w"] @ b) > 0
    assert found.residual == pytest.approx(float((b - matrix @ found.x["w"]).norm() / b.norm()), rel=1e-6)


def test_nothing_is_solved_for_a_target_of_zero() -> None:
    found = conjugate_gradients(lambda v: v, {"w": torch.zeros(3)}, iterations=5, tolerance=1e-4)
    assert found.iterations == 0 and found.residual == 0.0 and not found.x["w"].any()
