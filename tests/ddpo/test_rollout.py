"""Rollouts: what is stored, taking steps again with a graph, steering."""

from dataclasses import dataclass, replace

import pytest
import torch

from ddpo import Keep, LoraConfig, recompute, rollout
from ddpo.sampling.gaussian import Gaussian
from ddpo.steering import Selection, Steer
from ddpo.trajectory import Sites
from tests.ddpo.families import tiny_sd3
from tests.ddpo.tools import PROMPTS, make_policy, perturb
from tests.tiny import tiny_stable_diffusion

SEEDS = torch.tensor([11, 12, 13])


@pytest.fixture(scope="module")
def policy():
    made = make_policy(guidance_scale=3.0)
    perturb(made)
    return made


@pytest.fixture(scope="module")
def whole(policy):
    return rollout(policy, policy.encode(PROMPTS[:3]), SEEDS, with_kl=True)


@pytest.mark.parametrize(("keep", "count"), [(Keep.FINAL, 1), (Keep.last(3), 3), (Keep.last(9), 5), (Keep.ALL, 5)])
def test_the_states_that_are_kept_are_the_last_of_the_same_chains(policy, whole, keep, count):
    path = rollout(policy, whole.condition, SEEDS, with_kl=True, keep=keep)
    assert path.latents.shape[1] == count
    for k in range(path.first_state, 5):
        assert torch.equal(path.state(k), whole.state(k))
    assert torch.equal(path.log_probs, whole.log_probs) and torch.equal(path.kl, whole.kl)
    assert torch.equal(path.final, whole.final)


def test_means_that_are_kept_are_the_recorded_ones_of_the_noisy_steps(policy, whole):
    path = rollout(policy, whole.condition, SEEDS, recorded=policy.conditional, keep=Keep.FINAL, means=True)
    noisy = path.schedule.stochastic_steps
    assert whole.means is None and path.means.shape[:2] == (3, len(noisy))
    for place, k in enumerate(noisy):
        with torch.no_grad():
            alone = policy.conditional(k, whole.state(k), whole.condition).mean
        torch.testing.assert_close(path.means[:, place], alone, rtol=0, atol=1e-5)
    twice = type(path).concatenate([path, path.kept_on_cpu()])
    assert torch.equal(twice.means, torch.cat([path.means, path.means]))
    assert torch.equal(twice.first(2).means, path.means[:2])


def test_a_visit_is_a_state_of_the_chain_and_the_policys_mean_there(policy, whole):
    rows, steps = torch.tensor([2, 0, 2]), torch.tensor([3, 1, 0])
    path = rollout(policy, whole.condition, SEEDS, keep=Keep.FINAL, sites=Sites(rows=rows, steps=steps))
    visits, twice = path.visits, type(path).concatenate([path, path]).visits
    assert (visits.sites.rows.tolist(), visits.sites.steps.tolist()) == ([2, 0, 2], [0, 1, 3]), "by step"
    assert twice.sites.rows.tolist() == [2, 0, 2, 5, 3, 5]
    assert twice.sites.within(range(3, 6)).rows.tolist() == [2, 0, 2]
    for row, k, x, mean in zip(visits.sites.rows, visits.sites.steps, visits.latents, visits.mean, strict=True):
        assert torch.equal(x, whole.latents[row, k])
        with torch.no_grad():
            assert torch.equal(policy(int(k), whole.latents[:, k], whole.condition).mean[row], mean)


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_sd3])
@pytest.mark.parametrize("start", [0, 2])
def test_steps_taken_again_reach_what_was_sampled(build, start):
    kind = "ddim" if build is tiny_stable_diffusion else "flow_sde"
    policy = make_policy(pipeline=build(), kind=kind, guidance_scale=3.0)
    perturb(policy, scale=0.05)
    path = rollout(policy, policy.encode(PROMPTS[:3]), SEEDS, keep=Keep.last(3) if start else Keep.ALL)
    steps = recompute(policy.noise_free, path, start=start)
    assert [step.k for step in steps] == list(range(start, 4))
    assert steps[-1].after.requires_grad
    torch.testing.assert_close(steps[-1].after, path.final, rtol=1e-5, atol=1e-5)
    for step in steps:
        if step.k in path.schedule.stochastic_steps:
            log_prob = step.recorded.log_prob(step.after)
            torch.testing.assert_close(log_prob, path.log_probs[:, step.k], rtol=1e-6, atol=1e-3)
    steps[-1].after.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.trainable().values())


def test_the_gradient_of_a_chain_by_its_weights_equals_finite_differences_and_that_of_its_last_steps_is_a_part():
    policy = make_policy(num_steps=3, guidance_scale=1.0, adapter=LoraConfig(rank=2))
    perturb(policy, scale=0.05)
    weights = list(policy.trainable().values())
    condition = policy.encode(PROMPTS[:2])
    path = rollout(policy, condition, SEEDS[:2])

    def gradient(final):
        return torch.cat([g.flatten() for g in torch.autograd.grad(final.square().sum(), weights)])

    whole = gradient(recompute(policy, path, start=0)[-1].after)
    direct = gradient(rollout(policy, condition, SEEDS[:2], gradient=True).final)
    torch.testing.assert_close(whole, direct, rtol=1e-4, atol=1e-4 * float(whole.norm()))
    direction = whole / whole.norm()
    ends = []
    for size in (1e-2, -2e-2):
        for weight, along in zip(weights, direction.split([w.numel() for w in weights]), strict=True):
            weight.data.add_(along.view_as(weight), alpha=size)
        ends.append(float(rollout(policy, condition, SEEDS[:2]).final.double().square().sum()))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(whole.norm()), rel=1e-2)
    assert not torch.allclose(gradient(recompute(policy, path, start=2)[-1].after), whole, rtol=1e-2)


# ---- steering --------------------------------------------------------------------------------------------------------


class Shifted(Steer):
    """Moves the mean of every step by one standard deviation."""

    def propose(self, state, policy):
        return Gaussian(mean=state.gaussian.mean + state.gaussian.std, std=state.gaussian.std)


def test_a_shifted_proposal_moves_the_samples_and_the_log_probabilities_stay_the_policys(policy, whole):
    path = rollout(policy, whole.condition, SEEDS, steer=Shifted())
    assert torch.equal(rollout(policy, whole.condition, SEEDS, steer=Steer()).latents, whole.latents)
    std = policy.schedule.std[0]
    torch.testing.assert_close(path.state(1), whole.state(1) + std, rtol=1e-5, atol=1e-5)
    for k in policy.schedule.stochastic_steps:
        with torch.no_grad():
            own = policy(k, path.state(k), path.condition)
        assert torch.equal(own.log_prob(path.state(k + 1)), path.log_probs[:, k])


@dataclass(frozen=True)
class Swapped(Steer):
    """Reverses the rows after every step, and counts the steps in what it carries."""

    steps: int = 0

    def select(self, draw, policy):
        assert self.steps == draw.state.k
        ancestors = torch.arange(len(draw.candidates)).flip(0)
        return Selection(
            latents=draw.candidates[ancestors], ancestors=ancestors, then=replace(self, steps=self.steps + 1)
        )


def test_a_row_that_changes_places_takes_its_history_with_it(policy):
    """With equal conditions and swaps after all four steps, every sample ends where it began."""
    condition = policy.encode(["a cat"] * 3)
    plain = rollout(policy, condition, SEEDS, with_kl=True)
    noise = policy.noise(SEEDS)
    path = rollout(policy, condition, SEEDS, with_kl=True, steer=Swapped())
    for k in range(4):
        with torch.no_grad():
            step = policy(k, path.state(k), condition)
        z = (path.state(k + 1) - step.mean) / step.std
        placed = noise[:, k + 1].flip(0) if k % 2 else noise[:, k + 1]  # the row that a sample was in when it was drawn
        torch.testing.assert_close(z, placed, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(step.log_prob(path.state(k + 1)), path.log_probs[:, k], rtol=1e-6, atol=1e-3)
    assert torch.equal(path.state(0), plain.state(0))
    assert (path.kl > 0).all()
