"""The policy-gradient objective against explicit formulas, finite differences and an exactly solvable chain."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpo.credit.advantages import AdvantageConfig, AdvantageEstimator
from ddpo.objectives import Experience, Models
from ddpo.objectives.base import trained_view
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from ddpo.objectives.surrogates import ppo_loss
from ddpo.sampling.gaussian import Gaussian
from ddpo.trajectory import Condition, Samples, Trajectory
from ddpo.validation import FieldError

SURROGATES = (
    PolicyGradientConfig(surrogate="reinforce", updates_per_epoch=1),
    PolicyGradientConfig(surrogate="ppo", ratio="joint"),
    PolicyGradientConfig(surrogate="ppo", ratio="per_dimension"),
    PolicyGradientConfig(ratio="guard"),
    PolicyGradientConfig(ratio="joint", mask="kl"),
    PolicyGradientConfig(ratio="guard", mask="kl", mask_nats=1e-9),
)
names = [f"{config.surrogate}-{config.ratio}-{config.mask}" for config in SURROGATES]


class Chain:
    """x_{k+1} ~ N(decay x + gain_k x + shift_k, std_k^2) in every dimension; the reference has gain = shift = 0."""

    def __init__(self, num_steps, *, decay=0.8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.gain, self.shift = (
            (0.3 * torch.randn(num_steps, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
        )
        self.std = torch.linspace(0.9, 0.5, num_steps, dtype=torch.float64)
        self.decay = decay
        self.is_reference = False

    @property
    def parameters(self):
        return [self.gain, self.shift]

    def __call__(self, k, x, condition):
        k = torch.as_tensor(k).expand(len(x))
        mean = self.decay * x
        if not self.is_reference:
            mean = mean + self.gain[k, None] * x + self.shift[k, None]
        return Gaussian(mean=mean, std=self.std[k, None])

    @contextmanager
    def reference(self):
        self.is_reference = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.is_reference = False

    def sample(self, count, dims, generator):
        """Latents (B, T+1, D) from x_0 ~ N(0.5, 1), log-probabilities and KL (B, T), means (B, T, D)."""
        x = 0.5 + torch.randn(count, dims, generator=generator, dtype=torch.float64)
        states, log_probs, kls, means = [x], [], [], []
        with torch.no_grad():
            for k in range(len(self.std)):
                step = self(k, x, None)
                with self.reference():
                    kls.append(step.kl(self(k, x, None)))
                x = step.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
                log_probs.append(step.log_prob(x))
                states.append(x)
                means.append(step.mean)
        return (torch.stack(values, 1) for values in (states, log_probs, kls, means))

    def exact_objective(self, dims, alpha, target):
        """J = -E||x_T - target||^2 - alpha E sum KL, by propagating mean and variance."""
        mean, variance, kl = torch.tensor(0.5).double(), torch.tensor(1.0).double(), 0.0
        for gain, shift, std in zip(self.gain, self.shift, self.std, strict=True):
            kl = kl + (gain**2 * (variance + mean**2) + 2 * gain * shift * mean + shift**2) / (2 * std**2)
            mean, variance = (self.decay + gain) * mean + shift, (self.decay + gain) ** 2 * variance + std**2
        return dims * (-((mean - target) ** 2) - variance - alpha * kl)


def experience(latents, log_probs, kl, *, advantages, kl_weight, penalised, means=None):
    count = len(latents)
    schedule = SimpleNamespace(stochastic_steps=range(log_probs.shape[1]))
    condition = Condition(positive={}, negative={})
    trajectory = Trajectory(
        latents=latents,
        log_probs=log_probs,
        kl=kl,
        condition=condition,
        seeds=torch.arange(count),
        schedule=schedule,
        means=means,
    )
    return Experience(
        samples=Samples(prompts=("",) * count, metadata=({},) * count, trajectory=trajectory),
        start=0,
        scores=torch.zeros(count),
        advantages=advantages,
        kl_weight=kl_weight,
        groups=torch.zeros(count, dtype=torch.int64),
        penalised=penalised,
    )


def draw_experience(chain, *, count=6, dims=3, penalised=True, seed=0, move_away=0.0):
    generator = torch.Generator().manual_seed(seed)
    latents, log_probs, kl, means = chain.sample(count, dims, generator)
    advantages = torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)
    weight = torch.rand(count, generator=generator, dtype=torch.float64)
    log_probs = log_probs + move_away * torch.randn(log_probs.shape, generator=generator)
    means = means + move_away * torch.randn(means.shape, generator=generator)
    return experience(latents, log_probs, kl, advantages=advantages, kl_weight=weight, penalised=penalised, means=means)


def everything(sample):
    count, steps = sample.trajectory.log_probs.shape
    rows, steps = torch.meshgrid(torch.arange(count), torch.arange(steps), indexing="ij")
    return rows.flatten(), steps.flatten()


def losses(policy, config, sample, rows, steps):
    objective = config.build()
    return list(objective.losses(Models(policy=policy), objective.gather(sample, rows, steps, seed=0)))


def gradient(chain, config, sample, *, parts=1):
    """Gradient of the objective over all transitions, in `parts` shuffled micro-batches of uneven sizes."""
    rows, steps = everything(sample)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    cuts = [round(len(rows) * (i / parts) ** 1.5) for i in range(parts + 1)]
    for parameter in chain.parameters:
        parameter.grad = None
    for start, end in zip(cuts[:-1], cuts[1:], strict=True):
        chosen = order[start:end]
        for loss in losses(chain, config, sample, rows[chosen], steps[chosen]):
            (loss.value * (end - start) / len(rows)).backward()
    return torch.cat([parameter.grad for parameter in chain.parameters])


@pytest.mark.parametrize("config", SURROGATES, ids=names)
def test_gradient_at_the_old_parameters_is_minus_advantage_times_score_over_dims(config):
    chain = Chain(4)
    sample = draw_experience(chain, penalised=False)
    path, (rows, steps) = sample.trajectory, everything(sample)
    count, dims = len(rows), path.latents.shape[-1]
    x, after = path.latents[rows, steps], path.latents[rows, steps + 1]
    mean = chain(steps, x, None).mean.detach()
    # d log N / d mean = (x' - mean) / std^2, and d mean / d gain_k = x, d mean / d shift_k = 1.
    residual = sample.advantages[rows, steps][:, None] * (after - mean) / chain.std[steps, None] ** 2
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[0].index_add_(0, steps, (residual * x).sum(1))
    expected[1].index_add_(0, steps, residual.sum(1))
    torch.testing.assert_close(gradient(chain, config, sample), -expected.flatten() / count / dims)


@pytest.mark.parametrize("config", SURROGATES, ids=names)
def test_gradients_of_micro_batches_add_up_to_the_whole(config):
    chain = Chain(4)
    sample = draw_experience(chain)
    torch.testing.assert_close(gradient(chain, config, sample, parts=5), gradient(chain, config, sample))


def test_kl_term_equals_finite_differences_and_the_closed_form():
    chain, config = Chain(3), SURROGATES[1]
    sample = draw_experience(chain)
    sample = replace(sample, advantages=torch.zeros_like(sample.advantages))
    rows, steps = everything(sample)
    x, dims = sample.trajectory.latents[rows, steps], sample.trajectory.latents.shape[-1]

    def penalty(gain, shift):
        difference = gain[steps, None] * x + shift[steps, None]
        kl = (difference.square() / (2 * chain.std[steps, None] ** 2)).sum(1)
        return (sample.kl_weight[rows] * kl).mean() / dims

    (loss,) = losses(chain, config, sample, rows, steps)
    torch.testing.assert_close(loss.value, penalty(chain.gain, chain.shift))
    analytic = gradient(chain, config, sample)
    values = torch.cat([p.detach() for p in chain.parameters])
    for i in range(len(values)):
        step = torch.zeros_like(values)
        step[i] = 1e-6
        up, down = (penalty(*(values + sign * step).chunk(2)) for sign in (1, -1))
        assert math.isclose(float(analytic[i]), float(up - down) / 2e-6, rel_tol=1e-6, abs_tol=1e-9)


@given(
    st.floats(-2, 2), st.floats(-3, 3), st.floats(0.01, 0.5), st.integers(1, 1000), st.booleans(),
)  # fmt: skip
def test_ppo_equals_the_clipped_surrogate_for_both_signs_of_the_advantage(log_ratio, advantage, clip, dims, joint):
    power = 1.0 if joint else 1 / dims
    ratio = math.exp(power * log_ratio)
    loss, clipped = ppo_loss(
        torch.tensor([log_ratio], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        power=power,
        bound=clip,
    )
    if advantage >= 0:
        surrogate, is_clipped = advantage * min(ratio, 1 + clip), ratio > 1 + clip
    else:
        surrogate, is_clipped = advantage * max(ratio, 1 - clip), ratio < 1 - clip
    assert math.isclose(float(loss), -surrogate / power, rel_tol=1e-9, abs_tol=1e-9)
    if abs(advantage) > 1e-6 and abs(abs(ratio - 1) - clip) > 1e-9:
        assert bool(clipped) == is_clipped


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_clipped_transition_has_no_gradient_and_one_inside_has(sign):
    for log_ratio, has_gradient in ((sign * 0.5, False), (sign * 0.05, True), (-sign * 0.5, True)):
        value = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
        loss, clipped = ppo_loss(value, torch.tensor([sign]), power=1.0, bound=0.2)
        loss.sum().backward()
        assert bool(value.grad.ne(0)) == has_gradient == (not bool(clipped))


def test_per_dimension_is_joint_with_the_power_one_over_dims():
    chain = Chain(4)
    sample = draw_experience(chain, penalised=False, move_away=0.3)
    dims = sample.trajectory.latents.shape[-1]
    config = PolicyGradientConfig(ratio="per_dimension", clip_range=0.05)
    batch = config.build().gather(sample, *everything(sample), seed=0)
    (loss,) = losses(chain, config, sample, *everything(sample))
    distribution = chain(batch.steps, batch.latents, None)
    mean_log_ratio = (distribution.log_prob(batch.next_latents) - batch.log_probs) / dims
    ratio = mean_log_ratio.exp()
    ddpo = -torch.minimum(batch.advantages * ratio, batch.advantages * ratio.clamp(0.95, 1.05)).mean()
    torch.testing.assert_close(loss.value, ddpo)
    (joint,) = losses(chain, replace(config, ratio="joint"), sample, *everything(sample))
    by_hand, _ = ppo_loss(mean_log_ratio * dims, batch.advantages, power=1.0, bound=0.05)
    torch.testing.assert_close(joint.value, by_hand.mean() / dims)


def test_the_loss_reports_log_ratio_clip_and_kl_per_transition():
    chain = Chain(3)
    sample = draw_experience(chain, move_away=1.0)
    rows, steps = everything(sample)
    (loss,) = losses(chain, SURROGATES[1], sample, rows, steps)
    assert set(loss.metrics) == {"log_ratio", "log_ratio_nats", "clip_fraction", "step_kl_nats", "old_kl_nats"}
    assert all(value.shape == rows.shape and not value.requires_grad for value in loss.metrics.values())
    torch.testing.assert_close(loss.metrics["step_kl_nats"], sample.trajectory.kl[rows, steps])
    assert 0 < loss.metrics["clip_fraction"].mean() < 1
    assert torch.equal(loss.steps, steps) and torch.equal(loss.drift, loss.metrics["log_ratio_nats"].abs())
    (rooted,) = losses(chain, replace(SURROGATES[1], ratio="per_dimension"), sample, rows, steps)
    dims = sample.trajectory.final[0].numel()
    torch.testing.assert_close(rooted.metrics["log_ratio"] * dims, rooted.metrics["log_ratio_nats"])


def test_without_a_penalty_the_reference_is_never_called():
    chain = Chain(3)
    chain.reference = None
    sample = draw_experience(Chain(3), penalised=False)
    (loss,) = losses(chain, SURROGATES[1], sample, *everything(sample))
    assert "step_kl_nats" not in loss.metrics


def test_training_without_guidance_trains_the_conditional_view_of_the_policy():
    guided, conditional = object(), object()
    policy = SimpleNamespace(conditional=conditional)
    assert trained_view(policy, PolicyGradientConfig(train_guidance="none").build().demand) is conditional
    assert trained_view(guided, PolicyGradientConfig().build().demand) is guided


# ---- the whole estimator against the exact gradient -----------------------------------------------------------------

ALPHA, TARGET, DIMS, STEPS = 0.7, 1.5, 2, 4


def estimated_gradients(*, with_cost_to_go, config, baseline="batch", batches=40, count=2048):
    """Gradients of J, one for each independent batch of paths, as the trainer would form them."""
    chain = Chain(STEPS)
    estimator = AdvantageEstimator(AdvantageConfig(baseline=baseline, scale="none", clip=None))
    groups = torch.zeros(count, dtype=torch.int64) if baseline == "batch" else torch.arange(count) // 8
    found = []
    for seed in range(batches):
        latents, log_probs, kl, means = chain.sample(count, DIMS, torch.Generator().manual_seed(seed))
        scores = -(latents[:, -1] - TARGET).square().sum(1)
        cost = kl if with_cost_to_go else torch.zeros_like(kl)
        advantages = estimator(scores, groups, [""] * count, kl=cost, alpha=ALPHA, num_steps=STEPS)
        sample = experience(
            latents, log_probs, kl, advantages=advantages.values, kl_weight=advantages.kl_weight, penalised=True,
            means=means,
        )  # fmt: skip
        # The loss is a mean over transitions divided by the dimensions: its gradient is -grad J / (T D).
        found.append(-gradient(chain, config, sample) * STEPS * DIMS)
    return torch.stack(found)


def exact_gradient():
    chain = Chain(STEPS)
    return torch.cat(torch.autograd.grad(chain.exact_objective(DIMS, ALPHA, TARGET), chain.parameters))


def z_scores(gradients):
    error = gradients.std(0) / math.sqrt(len(gradients))
    return (gradients.mean(0) - exact_gradient()) / error


def test_the_exact_objective_agrees_with_sampling():
    chain = Chain(STEPS)
    latents, _, kl, _ = chain.sample(200_000, DIMS, torch.Generator().manual_seed(0))
    values = -(latents[:, -1] - TARGET).square().sum(1) - ALPHA * kl.sum(1)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - chain.exact_objective(DIMS, ALPHA, TARGET)) < 4.5 * error


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_reinforce_with_kl_cost_to_go_is_the_exact_gradient(baseline):
    scores = z_scores(estimated_gradients(with_cost_to_go=True, config=SURROGATES[0], baseline=baseline))
    assert scores.abs().max() < 4.5, scores


def test_ppo_at_the_old_parameters_is_the_exact_gradient_too():
    scores = z_scores(estimated_gradients(with_cost_to_go=True, config=SURROGATES[2]))
    assert scores.abs().max() < 4.5, scores


def test_without_the_future_kl_in_the_return_the_gradient_is_wrong():
    """What most peers compute: the KL as a direct loss term only."""
    scores = z_scores(estimated_gradients(with_cost_to_go=False, config=SURROGATES[0]))
    assert scores.abs().max() > 9, scores


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"clip_range": 0.0}, "clip_range"),
        ({"step_fraction": 0.0}, "step_fraction"),
        ({"step_fraction": 1.5}, "step_fraction"),
        ({"updates_per_epoch": 0}, "updates_per_epoch"),
        ({"inner_epochs": 0}, "inner_epochs"),
        ({"surrogate": "reinforce", "updates_per_epoch": 2}, "updates_per_epoch"),
        ({"surrogate": "reinforce", "updates_per_epoch": 1, "ratio": "guard"}, "ratio"),
        ({"surrogate": "reinforce", "updates_per_epoch": 1, "mask": "kl"}, "mask"),
        ({"mask_nats": 0.1}, "mask_nats"),
        ({"mask": "kl", "mask_nats": 0.0}, "mask_nats"),
        ({"mask": "kl", "clip_range": 0.1}, "clip_range"),
        ({"surrogate": "reinforce", "updates_per_epoch": 1, "inner_epochs": 2}, "updates_per_epoch"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_field(options, field):
    with pytest.raises(FieldError, match=f"^{field} must be"):
        PolicyGradientConfig(**options)
