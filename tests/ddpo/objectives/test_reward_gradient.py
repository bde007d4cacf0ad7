"""The reward's gradient: against a chain that is differentiated as it is sampled, and what each preset leaves out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpo import FullConfig, LoraConfig, Policy, SamplerConfig, rollout
from ddpo.control.diffusion.gradient_check import Paths, draw_paths, make_experience, pathwise_gradients
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives import Experience, Models
from ddpo.objectives.reward_gradient import PRESETS, RewardGradientConfig
from ddpo.sampling.samplers import SamplerKind
from ddpo.trajectory import Keep
from ddpo.validation import FieldError
from tests.tiny import tiny_stable_diffusion
from trainers.verification.reward_gradient import check_drtune

ALPHA, NUM_STEPS = 0.3, 4
PROMPTS = ["a cat", "a dog", "a bird"]


def score(images: Tensor, prompts: object, metadata: object) -> Tensor:
    return 100 * images.flatten(1).square().mean(1)


@pytest.fixture(scope="module")
def policy() -> Policy:
    sampler = SamplerConfig(num_steps=NUM_STEPS, guidance_scale=2.0)
    made = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def experience(policy: Policy) -> Experience:
    path = rollout(policy, policy.encode(PROMPTS), torch.tensor([5, 6, 7]), with_kl=True)
    made, _ = make_experience(path, torch.rand(3), AdvantageConfig(baseline="batch"), alpha=ALPHA)
    return replace(made, samples=replace(made.samples, prompts=tuple(PROMPTS)))


def gradients(policy: Policy, experience: Experience, config: RewardGradientConfig) -> dict[str, Tensor]:
    objective, rows = config.build(), torch.arange(3)
    batch = objective.gather(experience, rows, torch.zeros_like(rows), seed=3)
    losses = list(objective.losses(Models(policy=policy, score=score), batch))
    assert max(float(loss.drift.max()) for loss in losses) < 1e-8
    assert sum(len(loss.drift) for loss in losses) == 3
    return of(policy, sum(loss.value for loss in losses))


def of(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    weights = policy.trainable()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: value for name, value in zip(weights, found, strict=True) if value is not None}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    assert apart**0.5 < 1e-4 * sum(float(value.square().sum()) for value in one.values()) ** 0.5


def while_sampling(policy: Policy, experience: Experience, *, detached: int) -> dict[str, Tensor]:
    """The gradient of a chain that is sampled with a graph, cut at a state; written without the objective's code."""
    path = experience.trajectory
    noise, x, kl = policy.noise(path.seeds), path.state(detached), torch.zeros(3)
    for k in range(detached, NUM_STEPS):
        own = policy(k, x, path.condition)
        with policy.reference(grad=True):
            stock = policy(k, x, path.condition)
        if float(own.std) > 0:
            kl = kl + (own.mean - stock.mean).flatten(1).square().sum(1) / (2 * float(own.std) ** 2)
        x = own.mean + own.std * noise[:, k + 1]
    images = policy.decode(x, with_gradient=True)
    return of(policy, (-score(images, None, None) + ALPHA * kl).mean())


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_whole_chain_has_the_gradient_of_a_chain_sampled_with_a_graph(
    policy: Policy, experience: Experience, recomputed: bool
) -> None:
    ours = gradients(policy, experience, RewardGradientConfig(recompute_steps=recomputed))
    assert_alike(ours, while_sampling(policy, experience, detached=0))


def test_draft_k_is_the_chain_cut_k_steps_before_its_end(policy: Policy, experience: Experience) -> None:
    path = experience.trajectory
    kept = Keep.last(4).first_state(NUM_STEPS)
    few = replace(path, latents=path.latents[:, kept:])
    own = replace(experience, samples=replace(experience.samples, trajectory=few))
    ours = gradients(policy, own, RewardGradientConfig(last_steps=2))
    assert_alike(ours, while_sampling(policy, experience, detached=2))
    whole = while_sampling(policy, experience, detached=0)
    assert any(not torch.allclose(ours[name], whole[name], rtol=0.1) for name in ours)


def test_alignprop_is_the_mean_of_draft_k_over_its_draws(policy: Policy, experience: Experience) -> None:
    objective, rows = RewardGradientConfig(preset="alignprop").build(), torch.arange(3)
    batch = objective.gather(experience, rows, torch.zeros_like(rows), seed=3)
    ours = of(policy, sum(loss.value for loss in objective.losses(Models(policy=policy, score=score), batch)))
    lengths = {int(row): len(one.pattern) for members, one in batch.stretches for row in members}
    assert len(set(lengths.values())) > 1, "chains of unequal length"
    parts: dict[str, Tensor] = {}
    for row, length in lengths.items():
        samples = replace(experience, samples=experience.samples.index(torch.tensor([row])))
        draft = RewardGradientConfig(last_steps=length).build()
        one = draft.gather(samples, torch.tensor([0]), torch.tensor([0]), seed=0)
        for name, value in of(policy, next(draft.losses(Models(policy=policy, score=score), one)).value).items():
            parts[name] = parts.get(name, torch.zeros(())) + value / 3
    assert_alike(ours, parts)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_drawn_for_a_chain_depends_on_its_own_seed_alone(
    policy: Policy, experience: Experience, preset: str
) -> None:
    options = {"early_stop": 0.5} if preset == "refl" else {}  # a quarter of four steps is the last one
    objective = RewardGradientConfig(preset=preset, **options).build()

    def drawn(rows: list[int], seed: int) -> dict[int, object]:
        batch = objective.gather(experience, torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64), seed=seed)
        return {
            rows[int(row)]: (int(first), one.pattern, batch.eps[int(row)].tolist())
            for members, one in batch.stretches
            for row, first in zip(members, one.first, strict=True)
        }

    together = drawn([0, 1, 2], 3)
    assert all(drawn([row], 3)[row] == together[row] for row in range(3))
    varied = [drawn([0, 1, 2], seed) for seed in range(8)]
    assert any(one != varied[0] for one in varied) == (objective.demand.varies or preset == "draft_lv")


def test_an_early_end_is_scored_by_the_image_that_its_step_predicts(policy: Policy, experience: Experience) -> None:
    config = RewardGradientConfig(preset="refl", early_stop=1.0, ceiling=1e3)
    objective, rows, path = config.build(), torch.arange(3), experience.trajectory
    batch = objective.gather(experience, rows, torch.zeros_like(rows), seed=1)
    ((members, stretch),) = batch.stretches
    assert members.tolist() == [0, 1, 2] and len(set(stretch.first.tolist())) > 1, "one call of unequal steps"
    (loss,) = objective.losses(Models(policy=policy, score=score), batch)
    with torch.no_grad():
        for row, k in enumerate(stretch.first.tolist()):
            condition = path.condition.index(torch.tensor([row]))
            clean = policy.predict(k, path.state(k)[row : row + 1], condition).x0
            expected = score(policy.decode(clean), None, None)
            torch.testing.assert_close(loss.metrics["reward"][row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_extra_predictions_are_averaged_with_the_image_itself(policy: Policy, experience: Experience) -> None:
    objective, rows, path = RewardGradientConfig(preset="draft_lv").build(), torch.arange(3), experience.trajectory
    batch = objective.gather(experience, rows, torch.zeros_like(rows), seed=1)
    (loss,) = objective.losses(Models(policy=policy, score=score), batch)
    with torch.no_grad():
        latents = [path.final]
        for noise in batch.eps.unbind(1):
            noised = policy.schedule.a[-1] * path.final + policy.schedule.s[-1] * noise
            latents.append(policy.predict(NUM_STEPS - 1, noised, path.condition).x0)
        expected = torch.stack([score(policy.decode(each), None, None) for each in latents]).mean(0)
    assert len(latents) == 3
    torch.testing.assert_close(loss.metrics["reward"], expected, rtol=1e-4, atol=1e-5)


def test_drtune_has_no_jacobian_of_the_network() -> None:
    assert all(row.passed for row in check_drtune())


def test_all_weights_have_the_gradient_of_a_chain_sampled_with_a_graph() -> None:
    sampler = SamplerConfig(num_steps=NUM_STEPS, guidance_scale=1.0, eta=0.5)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=FullConfig())
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.mul_(1.01)
    path = rollout(policy, policy.encode(PROMPTS), torch.tensor([5, 6, 7]), with_kl=True)
    own, _ = make_experience(path, torch.rand(3), AdvantageConfig(baseline="batch"), alpha=ALPHA)
    assert_alike(gradients(policy, own, RewardGradientConfig()), while_sampling(policy, own, detached=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "ddpo"}, "preset must be one of draft"),
        ({"last_steps": 0}, "last_steps must be at least 1"),
        ({"trained_steps": 3}, "network_jacobian must be false"),
        ({"early_stop": 1.5}, r"early_stop must be in \[0, 1\]"),
        ({"preset": "refl", "extra_predictions": 2}, "extra_predictions must be 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        RewardGradientConfig(**options)


def pretrained_end(kind: SamplerKind) -> ToyProblem:
    sampler = SamplerConfig(kind=kind, num_steps=NUM_STEPS, guidance_scale=1.0, last_step="pretrained")
    return toy_problem(2, sampler=sampler, head="shared")


def test_a_last_step_of_the_pretrained_weights_is_differentiated_by_its_state_alone() -> None:
    paths = draw_paths(pretrained_end("ddim"), num_paths=4_000, chunk_size=200)
    assert paths.chunks[0].schedule.pretrained_steps == (NUM_STEPS - 1,)
    found = pathwise_gradients(paths)
    assert found.rms_z < 1.6
    missed = replace(found, exact=gradients_with_all_steps(paths))
    assert missed.rms_z > 4


def gradients_with_all_steps(paths: Paths) -> Tensor:
    """The gradient if the trained weights made the last step too, where they move as elsewhere."""
    whole = replace(paths.problem, sampler=replace(paths.problem.sampler, last_step="stock"))
    gain, shift = paths.gain.clone().requires_grad_(), paths.shift.clone().requires_grad_()
    slopes = torch.autograd.grad(whole.value(gain, shift), (gain, shift))
    return torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_steps_before_one_of_the_pretrained_weights(preset: str) -> None:
    paths = draw_paths(pretrained_end("flow_sde"), num_paths=16, chunk_size=8)
    config = RewardGradientConfig(preset=preset, **({"ceiling": 1e3} if preset == "refl" else {}))
    assert float(pathwise_gradients(paths, config).estimate.norm()) > 0
