"""Preferences: pairs by enumeration, losses by other formulas, draws, and what is skipped."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo import rollout, sample_seeds
from ddpo.contenders import predicted_clean, with_contenders
from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.credit.baselines import leave_one_out
from ddpo.objectives import Experience, Models
from ddpo.objectives.pairs import best_and_worst, opposite_ranks
from ddpo.objectives.preference import PreferenceConfig
from ddpo.sampling.samplers import SamplerConfig
from ddpo.trajectory import Keep, Samples
from ddpo.validation import FieldError

SAMPLERS = {
    "ddim": SamplerConfig(num_steps=5, guidance_scale=1.0),
    "flow": SamplerConfig(kind="flow_sde", num_steps=5, eta=0.7, guidance_scale=1.0),
}


def draw(*, sampler="ddim", count=8, group=4, start=0, keep=Keep.ALL, scores=None):
    """A policy whose head is not zero, and what it samples, of which the first `start` belong to another process."""
    problem = toy_problem(2, sampler=SAMPLERS[sampler])
    policy = problem.policy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    path = rollout(policy, policy.encode([""] * count), sample_seeds(0, 0, range(start, start + count)), keep=keep)
    own = problem.score(policy.decode(path.final), [""] * count, [])
    scores = torch.cat([torch.linspace(0, 1, start), own]) if scores is None else scores
    groups = torch.arange(len(scores)) // group
    advantages = leave_one_out(scores, groups)[start:]
    return policy, Experience(
        samples=Samples(prompts=("",) * count, metadata=({},) * count, trajectory=path),
        start=start,
        scores=scores,
        groups=groups,
        advantages=advantages[:, None].expand(-1, path.schedule.num_steps),
        kl_weight=torch.zeros(count),
        penalised=False,
    )


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=5), st.randoms())
def test_pairs_are_those_that_enumeration_finds_in_any_order_of_the_samples(groups, random):
    flat = [(group, float(score)) for group, scores in enumerate(groups) for score in scores]
    random.shuffle(flat)
    ids, scores = torch.tensor([group for group, _ in flat]), torch.tensor([score for _, score in flat])
    ends, opposite = best_and_worst(scores, ids), opposite_ranks(scores, ids)
    for b, (group, score) in enumerate(flat):
        rank = sorted(groups[group])
        assert (float(scores[ends.better[b]]), float(scores[ends.worse[b]])) == (rank[-1], rank[0])
        pair = (float(scores[opposite.better[b]]), float(scores[opposite.worse[b]]))
        assert pair in ((rank[3], rank[0]), (rank[2], rank[1])) and score in pair
        assert b in (int(opposite.better[b]), int(opposite.worse[b]))
        assert ids[ends.better[b]] == ids[ends.worse[b]] == ids[opposite.better[b]] == ids[opposite.worse[b]] == group
        assert (ends.weight[b] == 0) == (rank[-1] == rank[0]) and (opposite.weight[b] == 0) == (pair[0] == pair[1])
    for pairs in (ends, opposite):
        assert float(pairs.weight.mean()) == pytest.approx(float(pairs.weight.any()))


def test_pairs_within_the_margin_or_rounding_are_skipped_and_the_middle_of_an_odd_group_has_none():
    scores, groups = torch.tensor([1.0, 0.8, 5.0, 4.0, 1e3, 1e3 + 1e-4]), torch.arange(6) // 2
    assert best_and_worst(scores, groups, margin=0.5).weight.tolist() == [0, 0, 3, 3, 0, 0]
    assert best_and_worst(scores, groups).weight.tolist() == [1.5, 1.5, 1.5, 1.5, 0, 0]
    assert best_and_worst(scores[:4], groups[:4]).weight.tolist() == [1, 1, 1, 1]
    middle = opposite_ranks(torch.tensor([2.0, 9.0, 4.0]), torch.zeros(3, dtype=torch.int64))
    assert middle.weight.tolist() == [1.5, 1.5, 0]


@pytest.mark.parametrize("preset", ["dpo", "kto", "d3po"])
def test_a_unit_depends_on_the_pass_the_sample_and_its_slot_alone(preset):
    _, experience = draw(start=4)
    objective = PreferenceConfig(preset=preset, **({} if preset == "d3po" else {"noises": 3})).build()
    rows, slots = torch.tensor([5, 2, 5, 0]), torch.tensor([1, 1, 0, 1])
    together = objective.gather(experience, rows, slots, seed=7)
    for i in range(4):
        alone = objective.gather(experience, rows[i : i + 1], slots[i : i + 1], seed=7)
        for name in vars(together).keys() - {"condition", "latents", "next_latents", "log_probs"}:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name
    if preset != "d3po":
        other = objective.gather(experience, rows, slots, seed=8)
        assert (other.eps != together.eps).all()


def error(policy, step, clean, eps, condition):
    """|x0_theta - z|^2 / D by hand: the toy network predicts x0 on VP, and on flow the velocity, of which it is t^2."""
    a, s = policy.schedule.a[step], policy.schedule.s[step]
    x = a * clean + s * eps
    with torch.no_grad():
        x0 = policy.predict(int(step), x[None], condition).x0[0]
    scale = 1.0 if policy.kind == "sample" else s
    return float(((x0 - clean) / scale).square().mean())


@pytest.mark.parametrize(("sampler", "draws"), list(product(SAMPLERS, [1, 3])))
def test_dpo_is_the_logistic_loss_of_errors_computed_one_by_one(sampler, draws):
    policy, experience = draw(sampler=sampler, start=4)
    scores = experience.scores[4:].reshape(2, 4)
    objective = PreferenceConfig(beta=3.0, noises=2, draws=draws).build()
    rows, slots = torch.tensor([0, 3, 6]), torch.tensor([0, 1, 1])
    batch = objective.gather(experience, rows, slots, seed=0)
    (loss,) = objective.losses(Models(policy=policy), batch)
    one = experience.trajectory.condition.index(torch.tensor([0]))
    clean, losses = experience.trajectory.final.reshape(2, 4, 2), []
    for n, row in enumerate(rows.tolist()):
        group = row // 4
        change = []
        for z in (clean[group][scores[group].argmax()], clean[group][scores[group].argmin()]):
            args = [(step, z, eps, one) for step, eps in zip(batch.steps[n], batch.eps[n], strict=True)]
            own = sum(error(policy, *rest) for rest in args)
            with policy.reference():
                change.append((own - sum(error(policy, *rest) for rest in args)) / draws)
        losses.append(math.log1p(math.exp(0.5 * 3.0 * (change[0] - change[1]))))
    assert float(loss.value) == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert len({float(x) for x in batch.eps.flatten()}) == batch.eps.numel(), "every noise is its own"
    assert (loss.steps is None) == (draws > 1)


def test_kto_is_one_minus_the_utility_and_its_survey_is_the_gain():
    policy, experience = draw()
    objective = PreferenceConfig(preset="kto", beta=2.0, noises=3).build()
    rows, slots = torch.arange(8).repeat_interleave(3), torch.arange(3).repeat(8)
    batch = objective.gather(experience, rows, slots, seed=0)
    assert torch.equal(batch.sign, leave_one_out(experience.scores, experience.groups).sign()[rows])
    one = experience.trajectory.condition.index(torch.tensor([0]))

    def errors():
        clean = experience.trajectory.final[rows]
        return torch.tensor(
            [error(policy, k, z, e, one) for k, z, e in zip(batch.steps, clean, batch.eps, strict=True)]
        )

    gain = -errors()
    with policy.reference():
        gain = gain + errors()
    surveyed = objective.survey(Models(policy=policy), batch)
    torch.testing.assert_close(surveyed.detach(), gain, rtol=1e-4, atol=1e-5)
    for baseline in (0.2, -0.2):
        (loss,) = objective.losses(Models(policy=policy, surveyed=torch.tensor(baseline)), batch)
        expected = 1 - torch.sigmoid(2.0 * batch.sign * (gain - max(baseline, 0.0)))
        assert float(loss.value) == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.mark.parametrize(("sampler", "clip"), [("ddim", None), ("flow", None), ("flow", 0.01)])
def test_d3po_trains_every_step_of_a_pair_once_by_the_ratio_of_its_means(sampler, clip):
    policy, experience = draw(sampler=sampler)
    path, noisy = experience.trajectory, experience.decisions.tolist()
    objective = PreferenceConfig(preset="d3po", beta=4.0, clip=clip).build()
    units = objective.demand.units(len(noisy))
    rows, slots = torch.arange(8).repeat_interleave(units), torch.arange(units).repeat(8)
    batch = objective.gather(experience, rows, slots, seed=0)
    (loss,) = objective.losses(Models(policy=policy), batch)
    ranks = [group * 4 + experience.scores[group * 4 : group * 4 + 4].argsort(descending=True) for group in (0, 1)]
    pairs = [(int(rank[i]), int(rank[3 - i])) for rank in ranks for i in (0, 1)]

    def log_ratio(row, k):  # of Gaussians with one std: through the means alone
        x, after = path.latents[row : row + 1, k], path.latents[row : row + 1, k + 1]
        with torch.no_grad():
            mean = policy(k, x, path.condition.index(torch.tensor([row]))).mean
            with policy.reference():
                reference = policy(k, x, path.condition.index(torch.tensor([row]))).mean
        nats = ((after - reference).square() - (after - mean).square()).sum() / (2 * path.schedule.std[k] ** 2)
        ratio = math.exp(float(nats) / 2)  # two dimensions
        return math.log(ratio if clip is None else min(max(ratio, 1 - clip), 1 + clip))

    logits = [4.0 * (log_ratio(better, k) - log_ratio(worse, k)) for better, worse in pairs for k in noisy]
    expected = sum(math.log1p(math.exp(-logit)) for logit in logits) / len(logits)
    assert float(loss.value) == pytest.approx(expected, rel=1e-4)
    assert float(loss.drift.max()) < 1e-4 and float(batch.weight.mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_spo_compares_the_best_and_the_worst_next_state_from_one_state(sampler):
    problem = toy_problem(2, sampler=SAMPLERS[sampler])
    policy, experience = draw(sampler=sampler, count=6, group=2)
    path = with_contenders(
        rollout(policy, experience.trajectory.condition, experience.trajectory.seeds, means=True), steps=3, count=4
    )
    assert path.contended == path.schedule.stochastic_steps[-3:]
    states = torch.stack([path.state(k + 1) for k in path.contended], 1)
    assert torch.equal(path.contenders[:, :, 0], states), "the first is the one that the chain goes on from"
    contests = torch.stack(
        [
            torch.stack([problem.reward(predicted_clean(policy, path, step=c, contender=j)) for j in range(4)], 1)
            for c in range(3)
        ],
        dim=1,
    )
    experience = replace(experience, samples=replace(experience.samples, trajectory=path), contests=contests)
    objective = PreferenceConfig(preset="spo", beta=4.0, clip=None, margin=0.0, first_step=0).build()
    rows, slots = torch.arange(6).repeat_interleave(3), torch.arange(3).repeat(6)
    (loss,) = objective.losses(Models(policy=policy), objective.gather(experience, rows, slots, seed=0))
    expected = []
    for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
        k, condition = path.contended[slot], path.condition.index(torch.tensor([row]))
        x, std = path.state(k)[row : row + 1], path.schedule.std[k]
        with torch.no_grad():
            mean = policy(k, x, condition).mean
            with policy.reference():
                reference = policy(k, x, condition).mean
        others = path.contenders[row, slot]
        half_ratio = ((others - reference).square() - (others - mean).square()).sum(1) / (4 * std**2)  # two dimensions
        best, worst = int(contests[row, slot].argmax()), int(contests[row, slot].argmin())
        expected.append(math.log1p(math.exp(-4.0 * float(half_ratio[best] - half_ratio[worst]))))
    assert float(loss.value) == pytest.approx(sum(expected) / 18, rel=1e-4)
    assert float(loss.drift.max()) < 1e-4
    z = (path.contenders[:, :, 1:] - path.means[:, -3:, None]) / path.schedule.std[list(path.contended), None, None]
    assert abs(float(z.mean())) < 4.5 / math.sqrt(z.numel()) and abs(float(z.std()) - 1) < 4.5 / math.sqrt(
        2 * z.numel()
    )


def test_skipped_pairs_have_no_gradient_and_the_others_count_as_if_alone():
    scores = torch.tensor([1.0, 0.0, 0.5, 0.5, 2.0, 3.0])
    for preset in ("dpo", "d3po"):
        policy, experience = draw(count=6, group=2, scores=scores)
        objective = PreferenceConfig(preset=preset, beta=1.0).build()

        def gradient(rows, policy=policy, experience=experience, objective=objective):
            rows = torch.tensor(rows)
            batch = objective.gather(experience, rows, torch.zeros_like(rows), seed=0)
            (loss,) = objective.losses(Models(policy=policy), batch)
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss.value, [*policy.trainable().values()])])

        assert not gradient([2, 3]).any() and gradient([0, 1]).any()
        torch.testing.assert_close(gradient(range(6)) * 6, gradient([0, 1, 4, 5]) * 4)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"beta": 0.0}, "beta"),
        ({"clip": 1.0}, "clip"),
        ({"margin": -1.0}, "margin"),
        ({"noises": 0}, "noises"),
        ({"preset": "kto", "draws": 2}, "draws"),
        ({"preset": "d3po", "noises": 2}, "noises"),
        ({"preset": "kto", "margin": 0.1}, "margin"),
        ({"contenders": 1}, "contenders"),
        ({"preset": "spo", "train_guidance": "none"}, "train_guidance"),
    ],
)
def test_an_option_out_of_range_or_of_another_preset_is_refused_with_its_field(options, field):
    with pytest.raises(FieldError, match=f"^{field} must be"):
        PreferenceConfig(**options)
