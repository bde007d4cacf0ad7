"""Terms that hold weights to their start, against closed forms, finite differences and the stock scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ddpo import LoraConfig, Policy, SamplerConfig
from ddpo.regularization import (
    DenoisingConfig,
    EwcConfig,
    RegularizationConfig,
    add_pull,
    denoising_losses,
    noised_output,
    quadratic,
    summed_fisher,
    unclipped,
)
from ddpo.validation import FieldError
from tests.ddpo.families import tiny_sd3
from tests.tiny import tiny_stable_diffusion


def tiny(build=tiny_stable_diffusion, kind: str = "ddim") -> Policy:
    torch.manual_seed(0)
    sampler = SamplerConfig(kind=kind, num_steps=4, guidance_scale=1.0)
    policy = Policy(build(), sampler=sampler, adapter=LoraConfig(rank=2))
    with torch.no_grad():
        for name, value in policy.trainable().items():
            if "lora_B" in name:
                value.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return policy


def states(policy: Policy, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    clean, eps = (torch.randn(count, *policy.latent_shape, generator=random) for _ in range(2))
    return torch.arange(count) % policy.schedule.num_steps, clean, eps


def test_the_fisher_information_of_a_linear_gaussian_model_is_the_second_moment_of_its_inputs() -> None:
    random = torch.Generator().manual_seed(0)
    scales, weight = torch.tensor([0.5, 1.0, 3.0]), nn.Parameter(torch.randn(2, 3))
    inputs = scales * torch.randn(20_000, 3, generator=random)
    noise = torch.randn(20_000, 1, 2, generator=random)
    outputs = ((x @ weight.T)[None] for x in inputs)
    fisher = summed_fisher({"w": weight}, outputs, lambda number, like: noise[number])["w"] / len(inputs)
    expected = inputs.double().square().mean(0).expand(2, 3) / 2  # D = 2
    torch.testing.assert_close(fisher, expected, rtol=0.06, atol=0.0)  # (x z)^2 has a relative deviation below 3


def test_the_empirical_fisher_would_be_another_number() -> None:
    """With targets of the data in place of the model's own, a perfect fit has none, and a bad one too much."""
    weight, x = nn.Parameter(torch.ones(1, 1)), torch.tensor([[2.0]])
    misfits = (torch.zeros(1, 1), torch.full((1, 1), 10.0))
    found = [float(summed_fisher({"w": weight}, [x @ weight.T], lambda n, like, z=z: z)["w"]) for z in misfits]
    assert found == [0.0, 400.0]
    drawn = torch.randn(4000, 1, 1, generator=torch.Generator().manual_seed(0))
    total = summed_fisher({"w": weight}, (x @ weight.T for _ in drawn), lambda n, like: drawn[n])["w"] / len(drawn)
    assert float(total) == pytest.approx(4.0, rel=0.1)


def test_a_networks_scores_are_those_of_finite_differences() -> None:
    policy = unclipped(tiny())
    steps, clean, eps = states(policy, 1)
    condition, own = policy.encode(["a red circle"]), policy.trainable()
    z = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(5))

    def output() -> Tensor:
        return noised_output(policy, steps, clean, eps, condition)

    fisher = summed_fisher(own, [output()], lambda number, like: z)
    checked = 0
    for name in [name for name in own if "to_q" in name][:4]:
        place = int(fisher[name].argmax())
        flat, h = own[name].data.view(-1), 1e-2
        kept = float(flat[place])
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                flat[place] = kept + sign * h
                ends.append((output().double() * z).sum())
            flat[place] = kept
        slope = float(ends[0] - ends[1]) / (2 * h)
        if abs(slope) > 1e-2:
            assert float(fisher[name].view(-1)[place]) == pytest.approx(slope**2 / z.numel(), rel=2e-2)
            checked += 1
    assert checked >= 2


def test_at_the_start_of_a_lora_only_the_second_factor_has_information() -> None:
    policy = Policy(tiny_stable_diffusion(), sampler=SamplerConfig(num_steps=4, guidance_scale=1.0),
                    adapter=LoraConfig(rank=2))  # fmt: skip
    seen = unclipped(policy)
    output = noised_output(seen, *states(seen, 1), seen.encode(["a red circle"]))
    fisher = summed_fisher(policy.trainable(), [output], lambda number, like: torch.ones_like(like))
    assert all(float(value.max()) == 0.0 for name, value in fisher.items() if "lora_A" in name)
    assert sum(float(value.max()) > 0 for name, value in fisher.items() if "lora_B" in name) > 2


def test_the_denoising_loss_is_that_of_the_stock_scheduler_and_network() -> None:
    pipeline = tiny_stable_diffusion()
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    policy = unclipped(Policy(pipeline, sampler=SamplerConfig(num_steps=4, guidance_scale=3.0),
                              adapter=LoraConfig(rank=2)))  # fmt: skip
    steps, clean, eps = states(policy)
    condition = policy.encode(["a red circle"] * len(steps))
    times = policy.schedule.model_time[steps].long()
    with torch.no_grad():
        noised = scheduler.add_noise(clean, eps, times)
        text = pipeline.encode_prompt("a red circle", "cpu", 1, False)[0].expand(len(steps), -1, -1)
        output = pipeline.unet(noised, times, encoder_hidden_states=text).sample
        expected = (output - eps).square().flatten(1).mean(1)
        torch.testing.assert_close(denoising_losses(policy, steps, clean, eps, condition), expected)


@pytest.mark.parametrize(("build", "kind"), [(tiny_stable_diffusion, "ddim"), (tiny_sd3, "flow_sde")])
def test_the_gradient_of_the_denoising_loss_is_its_finite_difference(build, kind) -> None:
    policy = unclipped(tiny(build, kind))
    steps, clean, eps = states(policy)
    condition, own = policy.encode(["a red circle"] * len(steps)), policy.trainable()

    def loss() -> Tensor:
        return denoising_losses(policy, steps, clean, eps, condition).mean()

    gradients = torch.autograd.grad(loss(), list(own.values()), allow_unused=True)
    known = {name: g for name, g in zip(own, gradients, strict=True) if g is not None}
    norm = torch.cat([g.flatten() for g in known.values()]).norm()
    ends = []
    with torch.no_grad():
        for h in (1e-2, -1e-2):
            for name, gradient in known.items():
                own[name].add_(h * gradient / norm)
            ends.append(float(loss().double()))
            for name, gradient in known.items():
                own[name].sub_(h * gradient / norm)
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(norm), rel=2e-2)


def test_the_gradient_of_the_quadratics_is_their_finite_difference_and_is_added() -> None:
    random = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(3, generator=random), "b": torch.randn(2, 2, generator=random)}
    own = {name: nn.Parameter((value + torch.randn(value.shape, generator=random)).double()) for name, value in
           start.items()}  # fmt: skip
    own["b"].grad = torch.ones(2, 2, dtype=torch.float64)
    curvatures = (0.7, {name: torch.rand(value.shape, generator=random) for name, value in start.items()})
    expected = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    for curvature in curvatures:
        add_pull(own, start, curvature, scale=2.0)
        for name, value in own.items():
            for place in range(value.numel()):
                ends = []
                for h in (1e-4, -1e-4):
                    value.data.view(-1)[place] += h
                    ends.append(float(quadratic(own, start, curvature)))
                    value.data.view(-1)[place] -= h
                expected[name].view(-1)[place] += 2 * (ends[0] - ends[1]) / 2e-4
    for name, value in own.items():
        assert value.grad is not None
        torch.testing.assert_close(value.grad.float(), expected[name].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RegularizationConfig(l2=-1.0), "l2"),
        (lambda: EwcConfig(strength=float("inf")), "strength"),
        (lambda: EwcConfig(noises=0), "noises"),
        (lambda: DenoisingConfig(batch_size=0), "batch_size"),
        (lambda: DenoisingConfig(images="pictures"), "images"),
    ],
)
def test_keys_out_of_range_are_refused(make, field: str) -> None:
    with pytest.raises(FieldError, match=f"^{field} must be"):
        make()
