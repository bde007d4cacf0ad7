"""The verbs of an epoch: what each does, once, and what an algorithm may ask of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddpo import LoraConfig, Policy, SamplerConfig, StepSelection, full_noise_kl, path_kl
from ddpo.credit.kl import AdaptiveKL, FixedKL
from ddpo.credit.kl_course import KLCourse
from ddpo.credit.lagrangian import Constraint
from ddpo.objectives import Demand, Experience, Loss, Models
from ddpo.path_kl import visit_kl
from ddpo.trajectory import Keep, Samples
from ddpo.validation import UserError
from rewards import RewardError, RewardTerm, WeightedSum
from tests.tiny import tiny_stable_diffusion
from trainers.config import Config
from trainers.config.groups import (
    BatchConfig,
    EvaluationConfig,
    OptimizerConfig,
    RewardProcessConfig,
    RunConfig,
    ShapingConfig,
    TrackingConfig,
)
from trainers.config.io import ConfigError
from trainers.epoch.binding import online
from trainers.epoch.state import OLD, TrainState
from trainers.loop import train
from trainers.parallel.processes import Processes
from trainers.planning.plan import make_plan
from trainers.planning.preflight import preflight
from trainers.prompts import Prompt, PromptStream
from trainers.run_folder.checkpoint import latest_checkpoint, load_checkpoint
from trainers.run_folder.folder import read_metrics
from trainers.scoring.scorer import scoring_threads
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.progress import Progress

PROMPTS = [Prompt(text=text) for text in ("a cat", "a dog", "a bird")]


def tiny_policy(num_steps: int = 4) -> Policy:
    sampler = SamplerConfig(num_steps=num_steps, guidance_scale=1.0)
    return Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))


def small(**changes: object) -> Config:
    options = {
        "sampler": SamplerConfig(num_steps=4, guidance_scale=1.0),
        "batch": BatchConfig(samples_per_epoch=8, group_size=2, sample_batch_size=3, train_batch_size=8),
        "evaluation": EvaluationConfig(num_prompts=1, images_per_prompt=2, ode=False, every_epochs=0),
        "tracking": TrackingConfig(trackers=(), pictures_every_epochs=0),
        "epochs": 2,
        **changes,
    }
    return Config(**options)


def collected(config: Config, policy: Policy, reward: WeightedSum, epoch: int = 0):  # type: ignore[no-untyped-def]
    """An epoch's data, and the state that made them."""
    processes, stream = Processes(device="cpu"), PromptStream(PROMPTS, seed=0, shuffle=True)
    state = TrainState.start(config, policy, reward, stream)
    plan = make_plan(config, num_processes=1, num_stochastic=len(policy.schedule.stochastic_steps), branches=1)
    with scoring_threads(1) as threads:
        source = online(state, plan, threads=threads, processes=processes, progress=Progress(enabled=False))
        return source(epoch, Stopwatch(policy.device)), state


def brightness() -> WeightedSum:
    return WeightedSum([RewardTerm(name="brightness", normalize="std")])


def perturb(policy: Policy, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_the_total_of_an_epochs_scores_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes = WeightedSum.total, []

    def counted(self, components, *arguments, **options):  # type: ignore[no-untyped-def]
        sizes.append(len(components["brightness"]))
        return real(self, components, *arguments, **options)

    monkeypatch.setattr(WeightedSum, "total", counted)
    collected(small(shaping=ShapingConfig(steps=(1,))), tiny_policy(), brightness())
    assert sizes == [8, 8], "of all samples of three batches, and of their predicted images at one step"


def test_shaping_before_a_pretrained_step_sees_the_picture_that_this_step_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without noise the last step ends in the clean latents that it predicts; the trained weights predict others."""
    decoded = []
    monkeypatch.setattr(Policy, "decode", lambda self, latents: decoded.append(latents) or latents[:, :3].sigmoid())
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.0, last_step="pretrained")
    policy = Policy(tiny_stable_diffusion(set_alpha_to_one=True), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy, size=0.3)
    epoch, _ = collected(small(sampler=sampler, shaping=ShapingConfig(steps=(2, 3))), policy, brightness())
    path, predicted = epoch.samples.trajectory, torch.cat(decoded[2::3])
    assert path.schedule.pretrained_steps == (3,)
    assert torch.equal(predicted, path.final) and not torch.allclose(torch.cat(decoded[1::3]), path.final, atol=1e-2)
    with torch.no_grad():
        trained = policy.predict(3, path.state(3), path.condition).x0
    assert not torch.allclose(trained, predicted, atol=1e-2)


def test_the_kl_that_is_only_logged_is_that_of_the_sites() -> None:
    policy = tiny_policy()
    perturb(policy)
    epoch, _ = collected(small(), policy, brightness())
    trajectory = epoch.samples.trajectory
    sites = trajectory.visits.sites
    assert len(sites.rows) == 1, "at most 3% of 32 sampled steps, but one"
    exact = path_kl(policy, trajectory)[sites.rows, sites.steps]
    torch.testing.assert_close(visit_kl(policy, trajectory), exact, rtol=1e-3, atol=1e-6)
    assert epoch.kl.mean == pytest.approx(4 * float(exact.mean()), rel=1e-3)
    assert epoch.kl.of_all is None and float(exact) > 0


def test_a_reward_that_fails_finds_no_copy_of_the_weights_and_leaves_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, copies, calls = TrainState._copied, [], []
    monkeypatch.setattr(TrainState, "_copied", lambda self: copies.append(self.epoch) or real(self))

    def fails_in_the_second_epoch(images, prompts, metadata):  # type: ignore[no-untyped-def]
        calls.append(len(images))
        if sum(calls) > 8 + 2:
            raise RuntimeError("out of ink")
        return images.mean((1, 2, 3))

    config = small(run=RunConfig(output_dir=str(tmp_path), name="ink"))
    with pytest.raises(RewardError, match="out of ink"):
        train(tiny_policy(), reward=fails_in_the_second_epoch, prompts=PROMPTS, config=config)
    assert copies == [0], "before the first epoch's update; the second epoch never came to one"
    _, values = load_checkpoint(latest_checkpoint(tmp_path / "ink"))
    assert (values["epoch"], values["prompts"], values["updates"]) == (1, 4, 2)


# ---- an algorithm of one's own ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Own:
    """Two losses a batch, one that belongs to no step; samples come from a lagged policy; two passes."""

    kind: str = "own"

    def build(self) -> "Own":
        return self

    @property
    def demand(self) -> Demand:
        return Demand(
            name="own", unit="noise", units=lambda _: 2, updates=2, passes=2, keep=Keep.last(2),
            old_policy=lambda epochs: 0.5,
        )  # fmt: skip

    def gather(
        self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int
    ) -> tuple[Tensor, Tensor, object]:
        path = experience.trajectory
        assert path.latents.shape[1] == 2, "the last two states are kept"
        assert len(experience.scores) == 8, "scores are those of the whole epoch"
        return slots, path.final[rows], path.condition.index(rows)

    def losses(self, models: Models, batch: tuple[Tensor, Tensor, object]) -> Iterator[Loss]:
        steps, x, condition = batch
        policy, old = models.policy, models.old
        assert old is not None
        with policy.using(old), torch.no_grad():
            before = policy.predict(steps, x, condition).x0
        error = (policy.predict(steps, x, condition).x0 - before - 1).square().flatten(1).mean(1)
        yield Loss(value=error.mean(), metrics={"first": error.detach()}, steps=steps)
        size = policy.predict(steps, x, condition).x0.square().flatten(1).mean(1)
        yield Loss(value=size.mean(), metrics={"second": size.detach()})


def test_an_algorithm_of_ones_own_runs_with_two_losses_and_an_old_policy(tmp_path: Path) -> None:
    policy = tiny_policy()
    start = {name: value.detach().clone() for name, value in policy.trainable().items()}
    config = small(
        objective=Own(), optimizer=OptimizerConfig(learning_rate=1e-3), run=RunConfig(output_dir=str(tmp_path))
    )
    run = train(policy, reward="brightness", prompts=PROMPTS, config=config)
    first, second = read_metrics(run)
    assert first["updates"] == 4 and second["updates"] == 8
    assert first["policy/first"] > 0 and first["policy/second"] > 0
    assert [name for name in first if name.startswith("per_step/")] == [
        "per_step/kl_nats",
        "per_step/entropy_nats",
        "per_step/first",
    ]
    assert first["kl/path_nats"] == pytest.approx(0, abs=1e-6) and "policy/gate_nats" not in first
    tensors, values = load_checkpoint(latest_checkpoint(run))
    halves, values_of = tensors[OLD], {name: value.detach() for name, value in policy.trainable().items()}
    assert values["old_steps"] == 2
    once, _ = load_checkpoint(run / "checkpoints" / "epoch_000002")
    for name, value in once["weights"].items():
        assert torch.equal(value, values_of[name])
        assert not torch.equal(halves[name], value) or torch.equal(start[name], value)


def test_samples_come_from_the_old_policy() -> None:
    policy, reward = tiny_policy(), brightness()
    before, _ = collected(small(objective=Own()), policy, reward)
    processes, stream = Processes(device="cpu"), PromptStream(PROMPTS, seed=0, shuffle=True)
    state = TrainState.start(small(objective=Own()), policy, brightness(), stream)
    perturb(policy)
    plan = make_plan(state.config, num_processes=1, num_stochastic=4, branches=1)
    with scoring_threads(1) as threads:
        source = online(state, plan, threads=threads, processes=processes, progress=Progress(enabled=False))
        after = source(0, Stopwatch(policy.device))
    assert torch.equal(before.samples.trajectory.final, after.samples.trajectory.final)
    assert after.kl.mean == pytest.approx(0, abs=1e-6), "the KL is that of the policy that sampled"
    moved, _ = collected(small(), policy, brightness())
    assert not torch.equal(before.samples.trajectory.final, moved.samples.trajectory.final)


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Learns through the reward: the last step is taken again with its graph, decoded and scored."""

    kind: str = "ascent"
    chain: bool = False

    def build(self) -> "Ascent":
        return self

    @property
    def demand(self) -> Demand:
        return Demand(
            name="ascent", unit="chain", units=lambda _: 1, reward_gradient=True, keep=Keep.last(2), chain=self.chain
        )

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> tuple[Tensor, Samples]:
        samples, path = experience.samples, experience.trajectory
        own = Samples(
            prompts=tuple(samples.prompts[row] for row in rows.tolist()),
            metadata=tuple(samples.metadata[row] for row in rows.tolist()),
            trajectory=replace(path, condition=path.condition.index(rows), visits=None),
        )
        return path.state(path.schedule.num_steps - 1)[rows], own

    def losses(self, models: Models, batch: tuple[Tensor, Samples]) -> Iterator[Loss]:
        x, samples = batch
        policy, score = models.policy, models.score
        assert score is not None
        clean = policy(policy.schedule.num_steps - 1, x, samples.trajectory.condition).mean
        rewards = score(policy.decode(clean, with_gradient=True), samples.prompts, samples.metadata)
        yield Loss(value=-rewards.mean(), metrics={"reward": rewards.detach()})


def test_an_algorithm_may_learn_through_the_reward(tmp_path: Path) -> None:
    config = small(
        objective=Ascent(),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        epochs=6,
        run=RunConfig(output_dir=str(tmp_path)),
    )
    rows = read_metrics(train(tiny_policy(), reward=brightness(), prompts=PROMPTS, config=config))
    assert rows[-1]["reward/brightness"] > rows[0]["reward/brightness"]
    assert all(row["optimizer/grad_norm"] > 0 for row in rows)


def test_a_reward_without_a_gradient_is_refused_where_one_is_demanded(tmp_path: Path) -> None:
    def plain(images, prompts, metadata):  # type: ignore[no-untyped-def]
        return images.mean((1, 2, 3))

    config = small(objective=Ascent(), run=RunConfig(output_dir=str(tmp_path)))
    with pytest.raises(UserError, match="learns through the gradient of the rewards, and plain must be"):
        train(tiny_policy(), reward=plain, prompts=PROMPTS, config=config)
    named = replace(config, rewards=(RewardTerm(name="jpeg_compressibility"),))
    with pytest.raises(ConfigError, match="jpeg_compressibility must be differentiable with the objective ascent"):
        preflight(named, num_processes=1)
    fine = replace(config, rewards=(RewardTerm(name="brightness"),))
    preflight(fine, num_processes=1)
    elsewhere = replace(fine, reward_processes=RewardProcessConfig(devices=("cpu",)))
    with pytest.raises(ConfigError, match=r"reward_processes.devices: must be \[\]"):
        preflight(elsewhere, num_processes=1)


def test_a_unit_that_is_a_chain_is_planned_with_all_its_steps() -> None:
    rows = [
        make_plan(small(objective=Ascent(chain=chain)), num_processes=1, num_stochastic=4).training_rows
        for chain in (False, True)
    ]
    assert rows == [8, 8 * 4]


WINDOW = StepSelection(kind="window", size=2, start=1, shift_every_epochs=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5], ids=["estimated", "measured"])
def test_an_epoch_with_a_window_knows_what_its_kl_would_be_with_full_noise(alpha: float) -> None:
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.0, stochastic_steps=WINDOW)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy, 0.2)
    batch = BatchConfig(samples_per_epoch=64, group_size=2, sample_batch_size=16, train_batch_size=64)
    found, _ = collected(small(sampler=sampler, batch=batch, kl=FixedKL(alpha=alpha)), policy, brightness())
    trajectory, kl = found.samples.trajectory, found.kl
    assert trajectory.schedule.stochastic_steps == (1, 2)
    own, full = path_kl(policy, trajectory), full_noise_kl(policy, trajectory)
    assert (full[:, 1:3] == own[:, 1:3]).all() and (full > 0).all()
    sites = trajectory.visits.sites
    assert torch.bincount(sites.steps, minlength=4).tolist() == ([3, 0, 0, 4] if alpha else [3, 3, 4, 4])
    at_sites = full[sites.rows, sites.steps].double()
    of_step = [at_sites[sites.steps == k].mean() for k in range(4)]
    exact = own.sum(1).mean() if alpha else of_step[1] + of_step[2]
    assert kl.mean == pytest.approx(float(exact), rel=1e-4)
    assert kl.full_noise == pytest.approx(float(exact + of_step[0] + of_step[3]), rel=1e-4)
    assert kl.held == kl.full_noise > kl.mean > 0


@pytest.mark.parametrize(
    "followed",
    [{"kl": AdaptiveKL(target=1.0)}, {"constraints": (Constraint(reward="kl", at_most=1.0),)}],
    ids=["adaptive", "constraint"],
)
def test_a_full_noise_kl_that_something_follows_is_measured_at_every_step(followed) -> None:
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.0, stochastic_steps=WINDOW)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy, 0.2)
    batch = BatchConfig(samples_per_epoch=16, group_size=2, sample_batch_size=8, train_batch_size=16)
    config = small(sampler=sampler, batch=batch, **followed)
    plan = make_plan(config, num_processes=1, num_stochastic=2, branches=1)
    found, _ = collected(config, policy, brightness())
    exact = full_noise_kl(policy, found.samples.trajectory).sum(1).double().mean()
    assert found.kl.full_noise == pytest.approx(float(exact), rel=1e-4)
    window = 2 * 16 * 2  # each of its two steps, in sampling and in training
    assert (
        plan.reference_rows == window + 2 * 16 * 2
    )  # two rows, the policy's and the pretrained, at each of the others


def test_full_noise_is_reported_evaluated_and_followed_where_a_window_hides_steps(tmp_path: Path) -> None:
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.0, stochastic_steps=WINDOW)
    policy = Policy(tiny_stable_diffusion(), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy, 0.2)
    config = small(
        sampler=sampler,
        kl=AdaptiveKL(target=1e-6, alpha=0.01, rate=0.5),
        run=RunConfig(output_dir=str(tmp_path), name="run"),
        epochs=1,
    )
    run = train(policy, reward="brightness", prompts=PROMPTS, config=config)
    (row,) = read_metrics(run)
    assert row["kl/full_noise_nats"] > row["kl/path_nats"] > 0
    evaluation = json.loads((run / "summary.json").read_text())
    assert evaluation["kl, full noise (nats)"]["after"]["mean"] > evaluation["kl (nats)"]["after"]["mean"]


def test_an_older_checkpoint_goes_on_from_its_weight_of_the_kl() -> None:
    """It has the last path KL where a course is now, and its own gains in its configuration."""
    config = small(kl=AdaptiveKL(target=0.01, alpha=0.01, rate=0.08, damping=3.0))
    reward, stream = brightness(), PromptStream(PROMPTS, seed=0, shuffle=True)
    state = TrainState.start(config, tiny_policy(), reward, stream)
    values = {**state._values(), "alpha": 0.25, "path_kl": 0.02, "epoch": 7}
    del values["kl_course"]
    state._set_values(values)
    assert (state.alpha, state.epoch, state.course) == (0.25, 7, KLCourse())
    state.follow_kl(0.02)
    state.follow_kl(0.02)
    assert state.alpha == pytest.approx(0.25 * 2**0.08)


def test_without_a_window_nothing_more_is_measured() -> None:
    found, _ = collected(small(), tiny_policy(), brightness())
    assert found.kl.full_noise is None and found.kl.held == found.kl.mean
