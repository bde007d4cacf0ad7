"""Adjoint matching: adjoints against the affine chain's, the fixed point against Riccati, what is drawn and kept."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpo.control.diffusion.gradient_check import make_experience
from ddpo.control.diffusion.toy_problem import ToyProblem, toy_problem
from ddpo.credit.advantages import AdvantageConfig
from ddpo.objectives import Experience, Models
from ddpo.objectives.adjoint_matching import AdjointMatchingConfig
from ddpo.objectives.adjoint_targets import AdjointRules, AdjointTargets, Targets, draw_steps
from ddpo.policy import Policy
from ddpo.rollout import rollout
from ddpo.seeds import sample_seeds
from ddpo.validation import FieldError

COUNT, NOISY = 4_000, 9  # the last of the ten steps has no noise
RULES = AdjointRules(num_trained=None, early_fraction=0.5, published_pairing=False, loss_quantile=None, kept_epochs=0)


@pytest.fixture(scope="module")
def problem() -> ToyProblem:
    return toy_problem(2)


@pytest.fixture(scope="module")
def best(problem: ToyProblem) -> Policy:
    """The policy whose chain is the Riccati optimum: u_k = (F*_k - F_k) x / std_k + (g*_k - g_k) / std_k."""
    policy, chain = problem.policy(), problem.optimum.chain
    std = problem.schedule.std[:NOISY]
    with torch.no_grad():
        policy.trainable()["head.gain"][:NOISY] = ((chain.F - problem.reference.F)[:NOISY] / std[:, None, None]).float()
        policy.trainable()["head.shift"][:NOISY] = ((chain.g - problem.reference.g)[:NOISY] / std[:, None]).float()
    return policy


def models(problem: ToyProblem, policy: Policy) -> Models:
    return Models(policy=policy, score=lambda images, prompts, metadata: problem.score(images, [], []))


def sampled(problem: ToyProblem, policy: Policy, *, count: int = COUNT, seed: int = 0) -> Experience:
    path = rollout(policy, policy.encode(["x"] * count), sample_seeds(seed, 0, range(count)), means=True)
    experience, _ = make_experience(path, torch.zeros(count), AdvantageConfig(baseline="batch"), alpha=0.0)
    return replace(experience, alpha=problem.alpha)


def targets(problem: ToyProblem, policy: Policy, rules: AdjointRules = RULES, *, count: int = COUNT) -> Targets:
    experience = sampled(problem, policy, count=count)
    made = AdjointTargets(rules)(models(problem, policy), experience, [count - 7, 7], seed=3, gather=lambda x: x)
    return made.prepared[0]


def test_adjoints_are_those_of_the_affine_chain(problem: ToyProblem, best: Policy) -> None:
    """a_T = (Q x_T - q) / alpha and a_k = F_k' a_{k+1} of the pretrained F, whatever policy sampled."""
    experience = sampled(problem, best, count=5)
    path, chain, std = experience.trajectory, problem.reference, problem.schedule.std
    adjoint = (path.final.double() @ problem.reward.P - problem.reward.q) / problem.alpha
    made = targets(problem, best, count=12)
    (prepared,) = AdjointTargets(RULES)(models(problem, best), experience, [3, 2], seed=0, gather=lambda x: x).prepared
    assert float(std[NOISY]) == 0
    adjoint = adjoint @ chain.F[NOISY]
    for k in reversed(range(NOISY)):
        mean = path.state(k).double() @ chain.F[k].T + chain.g[k]
        torch.testing.assert_close(
            prepared.means[:, k].double(), mean - std[k] ** 2 * adjoint, rtol=1e-4, atol=1e-4
        )  # fmt: skip
        torch.testing.assert_close(
            prepared.pull[:, k].double(), 0.5 * (std[k] * adjoint).square().sum(1), rtol=1e-3, atol=1e-5
        )
        adjoint = adjoint @ chain.F[k]
    assert made.steps.tolist() == [list(range(NOISY))] * 12 and bool((made.weights == 1).all())


def gradient_z(problem: ToyProblem, policy: Policy, rules: AdjointRules) -> Tensor:
    """z-scores of the loss's gradient by every weight of the head, over samples: 0 at a fixed point."""
    found, path = targets(problem, policy, rules), sampled(problem, policy).trajectory
    std = problem.schedule.std.float()[found.steps, None]
    with torch.no_grad():
        means = torch.stack([policy(k, path.state(k), path.condition).mean for k in range(NOISY)], dim=1)
    residual = (means.gather(1, found.steps[..., None].expand_as(found.means)) - found.means) / std
    by_gain = residual[..., :, None] * found.states[..., None, :]
    each = torch.cat([by_gain.flatten(2), residual], dim=2) * found.weights[..., None]
    of_steps = torch.zeros(COUNT, NOISY, each.shape[2]).scatter_add_(1, found.steps[..., None].expand_as(each), each)
    return (of_steps.mean(0) / (of_steps.std(0) / math.sqrt(COUNT))).flatten()


@pytest.mark.parametrize("few", [False, True])
def test_the_riccati_optimum_is_the_fixed_point_with_the_next_states_adjoint(
    problem: ToyProblem, best: Policy, few: bool
) -> None:
    rules = replace(RULES, num_trained=4, early_fraction=0.6) if few else RULES
    assert float(gradient_z(problem, best, rules).abs().max()) < 4.5


def test_the_published_pairing_has_another_fixed_point(problem: ToyProblem, best: Policy) -> None:
    assert float(gradient_z(problem, best, replace(RULES, published_pairing=True)).abs().max()) > 20


def test_the_loss_is_the_squared_distance_to_the_targets_in_nats(problem: ToyProblem, best: Policy) -> None:
    experience = sampled(problem, best, count=6)
    objective = AdjointMatchingConfig().build()
    made = objective.demand.prepare.make()(models(problem, best), experience, [6], seed=0, gather=lambda x: x)
    rows, slots = torch.tensor([5, 0, 3]), torch.tensor([8, 0, 4])
    batch = objective.gather(made, rows, slots, seed=0)
    (loss,) = objective.losses(models(problem, best), batch)
    found, std = made.prepared[0], problem.schedule.std.float()
    with torch.no_grad():
        condition = experience.trajectory.condition.index(rows)
        means = best(slots, found.states[rows, slots], condition).mean
    nats = 0.5 * ((means - found.means[rows, slots]) / std[slots, None]).square().sum(1)
    torch.testing.assert_close(loss.metrics["matching_nats"], nats)
    torch.testing.assert_close(loss.value, nats.mean() / 2)
    assert torch.equal(loss.steps, slots)


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.5), (4, 0.6), (6, 0.25)])
def test_weights_make_up_for_how_often_a_step_is_drawn(count: int, fraction: float) -> None:
    rules = replace(RULES, num_trained=count, early_fraction=fraction)
    noisy = torch.arange(2, 12)
    steps, weights = draw_steps(rules, noisy, sample_seeds(0, 0, range(20_000)), seed=5)
    assert bool(torch.isin(steps, noisy).all())
    early = (steps < 2 + 10 * fraction).sum(1)
    if fraction * 10 == round(fraction * 10):
        assert bool((early == count // 2).all())
    for k in noisy.tolist():
        share = (weights * (steps == k)).mean(1)
        assert abs(float(share.mean()) - 0.1) < 4.5 * float(share.std()) / math.sqrt(20_000)


def test_samples_above_the_moving_quantile_are_left_out(problem: ToyProblem, best: Policy) -> None:
    rules = replace(RULES, loss_quantile=0.75)
    preparation = AdjointTargets(rules)
    shares, threshold = [], 0.0
    for seed in range(2):
        experience = sampled(problem, best, count=40, seed=seed)
        (made,) = preparation(models(problem, best), experience, [40], seed=0, gather=lambda x: x).prepared
        path, std = experience.trajectory, problem.schedule.std[:NOISY].float()
        losses = (0.5 * ((path.means - made.means) / std[:, None]).square().sum(2)).mean(1)
        now = float(losses.double().quantile(0.75))
        threshold = now if seed == 0 else 0.9 * threshold + 0.1 * now
        assert made.weights[:, 0].tolist() == [float(loss <= threshold) for loss in losses]
        shares.append(float(made.weights.mean()))
    assert shares[0] == 0.75
    assert float(preparation.tensors()["threshold"]) == pytest.approx(threshold)


def test_a_sample_without_a_finite_gradient_has_no_weight_and_spoils_no_other(
    problem: ToyProblem, best: Policy
) -> None:
    def score(images: Tensor, prompts: object, metadata: object) -> Tensor:
        good = problem.score(images, [], [])
        return torch.cat([good[:2], (0 * good[2:3]).sqrt(), good[3:]])

    broken = replace(models(problem, best), score=score)
    experience = sampled(problem, best, count=5)
    (made,) = AdjointTargets(RULES)(broken, experience, [5], seed=0, gather=lambda x: x).prepared
    (whole,) = AdjointTargets(RULES)(models(problem, best), experience, [5], seed=0, gather=lambda x: x).prepared
    kept = torch.tensor([0, 1, 3, 4])
    assert made.weights.sum(1).tolist() == [9, 9, 0, 9, 9] and bool(made.means.isfinite().all())
    torch.testing.assert_close(made.means[kept], whole.means[kept])


def test_remembered_epochs_take_their_turns_and_survive_being_saved(problem: ToyProblem, best: Policy) -> None:
    objective = AdjointMatchingConfig(steps_per_sample=2, replay_epochs=2).build()
    assert objective.demand.units(10) == 6
    make = objective.demand.prepare.make
    preparation, other = make(), make()
    epochs = []
    for seed in range(4):
        other.load({name: value.clone() for name, value in preparation.tensors().items()})
        experience = sampled(problem, best, count=3, seed=seed)
        made, again = (
            one(models(problem, best), experience, [3], seed=seed, gather=lambda x: x) for one in (preparation, other)
        )
        assert len(made.prepared) == len(again.prepared) == min(seed + 1, 3)
        epochs.insert(0, made.prepared[0])
        rows, slots = torch.tensor([2, 0, 1, 2, 0, 1]), torch.arange(6).flip(0)
        batch, same = (objective.gather(one, rows, slots, seed=0) for one in (made, again))
        for place, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
            kept = epochs[(slot // 2) % min(seed + 1, 3)]
            assert torch.equal(batch.states[place], kept.states[row, slot % 2])
            assert torch.equal(batch.targets[place], kept.means[row, slot % 2])
            assert int(batch.steps[place]) == int(kept.steps[row, slot % 2])
        assert torch.equal(batch.targets, same.targets) and torch.equal(batch.weights, same.weights)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"steps_per_sample": 3}, "steps_per_sample"),
        ({"steps_per_sample": 0}, "steps_per_sample"),
        ({"early_fraction": 0.6}, "early_fraction"),
        ({"steps_per_sample": 4, "early_fraction": 1.0}, "early_fraction"),
        ({"loss_quantile": 1.0}, "loss_quantile"),
        ({"replay_epochs": -1}, "replay_epochs"),
        ({"updates_per_epoch": 0}, "updates_per_epoch"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_field(options: dict[str, float], field: str) -> None:
    with pytest.raises(FieldError, match=f"^{field} must be"):
        AdjointMatchingConfig(**options)
