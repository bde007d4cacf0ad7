import dataclasses
import math
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.kl import AdaptiveKL, FixedKL
from ddpo.credit.lagrangian import Constraint
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from ddpo.sampling.samplers import SamplerConfig
from rewards import RewardTerm, WeightedSum
from trainers.config import Config
from trainers.config.groups import BatchConfig, DistributedConfig, ModelConfig, RunConfig, TrackingConfig
from trainers.config.io import load_config
from trainers.parallel.shares import chunks, share, split_evenly
from trainers.planning.plan import PlanError, check_whole_groups, expected_plan, make_plan
from trainers.planning.preflight import preflight
from trainers.session import Loaded, make_session


def a_config(
    *, samples=256, group=8, sample_batch=8, train_batch=8, steps=50, guidance=5.0, kl=0.0, epochs=100,
    strategy="ddp", advantages=None, **objective,
):  # fmt: skip
    return Config(
        advantages=advantages or AdvantageConfig(),
        distributed=DistributedConfig(strategy=strategy),
        batch=BatchConfig(
            samples_per_epoch=samples, group_size=group, sample_batch_size=sample_batch, train_batch_size=train_batch
        ),
        sampler=SamplerConfig(num_steps=steps, guidance_scale=guidance),
        objective=PolicyGradientConfig(**objective),
        kl=FixedKL(alpha=kl),
        epochs=epochs,
    )


@given(
    processes=st.integers(1, 6),
    groups=st.integers(1, 12),
    group=st.integers(2, 9),
    sample_batch=st.integers(1, 40),
    train_batch=st.integers(1, 200),
    steps=st.integers(1, 60),
    fraction=st.floats(0.01, 1),
    updates=st.integers(1, 60),
    inner=st.integers(1, 3),
    strategy=st.sampled_from(["ddp", "fsdp"]),
)
def test_every_transition_of_every_sample_is_trained_exactly_once(
    processes, groups, group, sample_batch, train_batch, steps, fraction, updates, inner, strategy
):
    config = a_config(
        samples=groups * group,
        group=group,
        sample_batch=sample_batch,
        train_batch=train_batch,
        steps=steps,
        step_fraction=fraction,
        updates_per_epoch=updates,
        inner_epochs=inner,
        strategy=strategy,
    )
    assume(updates <= max(1, round(fraction * steps)))
    assume(groups * group >= processes)
    uneven = groups * group % processes != 0
    assume(not (strategy == "fsdp" and uneven and 1 in (sample_batch, train_batch)))
    plans = [make_plan(config, num_processes=processes, num_stochastic=steps, rank=r) for r in range(processes)]
    assert sum(plan.samples_per_process for plan in plans) == config.batch.samples_per_epoch
    assert len({plan.micro_batches_per_update for plan in plans}) == 1, "all meet at the same safe points"
    assert len({len(plan.sample_batches) for plan in plans}) == 1
    for plan in plans:
        assert sum(plan.sample_batches) == plan.samples_per_process
        assert max(plan.sample_batches) <= sample_batch
        assert sum(plan.shares) == plan.units_per_sample <= steps
        assert len(plan.shares) == updates
        assert max(plan.shares) - min(plan.shares) <= 1
        assert min(plan.shares) >= 1
        assert sum(plan.units_per_update) == plan.samples_per_process * plan.units_per_sample
        assert tuple(map(sum, plan.micro_batches)) == plan.units_per_update
        assert max(map(max, plan.micro_batches)) <= train_batch
        if strategy == "fsdp":
            assert min(plan.sample_batches) >= 1
            assert min(map(min, plan.micro_batches)) >= 1
        assert "\n\n" not in plan.describe()
    largest = make_plan(config, num_processes=processes, num_stochastic=steps)
    assert largest.samples_per_process == max(plan.samples_per_process for plan in plans)
    assert largest.optimizer_steps_total == updates * inner * config.epochs
    trained = inner * sum(sum(plan.units_per_update) for plan in plans)
    assert {plan.training_rows for plan in plans} == {2 * trained}


@given(total=st.integers(0, 500), parts=st.integers(1, 40))
def test_an_even_split_adds_up(total, parts):
    split = split_evenly(total, parts)
    assert sum(split) == total
    assert len(split) == parts
    assert max(split) - min(split) <= 1


@given(total=st.integers(0, 500), size=st.integers(1, 40))
def test_only_the_last_chunk_is_smaller(total, size):
    pieces = chunks(total, size)
    assert sum(pieces) == total
    assert len(pieces) == math.ceil(total / size)
    assert all(piece == size for piece in pieces[:-1])


@given(samples=st.integers(2, 600), group=st.integers(2, 16), processes=st.integers(1, 9))
def test_a_refused_size_comes_with_the_nearest_possible_ones(samples, group, processes):
    config = a_config(samples=samples, group=group)
    try:
        make_plan(config, num_processes=processes, num_stochastic=50)
    except PlanError as error:
        proposed = [int(number) for number in str(error).rpartition("nearest possible: ")[2].split(" or ")]
    else:
        proposed = [samples]
    for number in proposed:
        possible = dataclasses.replace(config, batch=dataclasses.replace(config.batch, samples_per_epoch=number))
        make_plan(possible, num_processes=processes, num_stochastic=50)
        assert abs(number - samples) < group + processes


def test_what_does_not_divide_by_processes_is_split_by_samples():
    plans = [make_plan(a_config(samples=24, group=8), num_processes=5, num_stochastic=50, rank=r) for r in range(5)]
    assert [plan.samples_per_process for plan in plans] == [4, 5, 5, 5, 5]
    assert not plans[0].whole_groups
    assert make_plan(a_config(samples=48, group=8), num_processes=3, num_stochastic=50).whole_groups
    config = a_config(samples=9, group=3, sample_batch=4, train_batch=5, steps=2, strategy="fsdp", updates_per_epoch=1)
    first, second = (make_plan(config, num_processes=2, num_stochastic=2, rank=rank) for rank in (0, 1))
    assert (first.sample_batches, second.sample_batches) == ((2, 2), (4, 1))
    assert (first.micro_batches, second.micro_batches) == (((4, 4),), ((5, 5),))


def test_impossible_plans_name_the_cure():
    with pytest.raises(PlanError) as caught:
        make_plan(a_config(samples=252, group=8), num_processes=3, num_stochastic=50)
    assert str(caught.value) == (
        "batch.samples_per_epoch must be a multiple of 8 (batch.group_size) and at least one for each of 3 processes, "
        "got 252; nearest possible: 248 or 256"
    )
    with pytest.raises(PlanError, match="must be a multiple of 8 .batch.group_size., got 4; nearest possible: 8$"):
        make_plan(a_config(samples=4, group=8), num_processes=1, num_stochastic=50)
    with pytest.raises(PlanError, match="at least one for each of 17 processes, got 16; nearest possible: 24$"):
        make_plan(a_config(samples=16, group=8), num_processes=17, num_stochastic=50)
    with pytest.raises(PlanError, match="train_batch_size must be at least 2 with distributed.strategy fsdp"):
        make_plan(a_config(train_batch=1, strategy="fsdp"), num_processes=3, num_stochastic=50)
    make_plan(a_config(train_batch=1, strategy="fsdp"), num_processes=4, num_stochastic=50)
    with pytest.raises(PlanError, match="objective.updates_per_epoch must be at most 5, got 6"):
        make_plan(a_config(step_fraction=0.5, updates_per_epoch=6), num_processes=1, num_stochastic=10)


def test_rows_follow_ddpos_published_run():
    """256 images, 50 steps, guidance in both phases: 51,200 rows (x .803 and 1.714 TFLOP = 65 PFLOP with backward)."""
    plan = make_plan(a_config(group=2, updates_per_epoch=4), num_processes=8, num_stochastic=50)
    assert plan.sampling_rows == plan.training_rows == 25_600
    assert plan.reference_rows == 2 * 384, "3% of 12,800 sampled steps, with guidance"
    assert plan.shares == (13, 13, 12, 12)
    assert plan.units_per_update == (416, 416, 384, 384)
    assert plan.denoiser_rows_per_epoch == 51_968


def test_guidance_and_kl_change_the_rows():
    def rows(**settings):
        plan = make_plan(a_config(samples=16, steps=10, **settings), num_processes=1, num_stochastic=9)
        return plan.sampling_rows, plan.training_rows, plan.reference_rows

    assert rows() == (320, 288, 8), "without a weight: 4 sites, 3% of 160 sampled steps"
    assert rows(guidance=1.0) == (160, 144, 4)
    assert rows(train_guidance="none") == (320, 144, 4)
    assert rows(kl=0.1) == (320, 288, 288), "what the pretrained model says in sampling serves training too"
    assert rows(kl=0.1, train_guidance="none") == (320, 144, 144)
    assert rows(kl=0.1, train_batch=7) == (320, 288, 576), "calls of another size round in another way"


def test_the_description_reads_as_a_table():
    config = a_config(samples=272, group=8, steps=10, step_fraction=0.5, train_batch=128, epochs=3)
    plan = make_plan(config, num_processes=2, num_stochastic=10)
    assert plan.describe().splitlines() == [
        "processes     2",
        "epoch         272 images = 34 prompts x 8",
        "sampling      10 steps; batches per process: 17 x 8 images",
        "training      5 of 10 stochastic steps per image; 2 updates x 1 inner epoch, per image and update: 3 + 2",
        "an update     408 + 272 stochastic steps per process",
        "              in 4 + 3 micro-batches of 128 per process",
        "denoiser rows up to 8,322 per epoch = 5,440 sampling + 2,720 training + 162 reference",
        "run           3 epochs, 6 optimizer steps, 816 images",
    ]
    timed = make_plan(dataclasses.replace(config, max_minutes=2.5), num_processes=2, num_stochastic=10).describe()
    assert timed.endswith("816 images, or 2.5 minutes of training")


def test_of_a_plan_that_was_shown_only_what_differs_is_told_again():
    plan = make_plan(a_config(), num_processes=1, num_stochastic=10)
    assert plan.describe(shown=plan) == ""
    fewer = make_plan(a_config(), num_processes=1, num_stochastic=9)
    changed = fewer.describe(shown=plan).splitlines()
    assert set(changed) == set(fewer.describe().splitlines()) - set(plan.describe().splitlines())
    assert changed


@given(groups=st.integers(1, 200), steps=st.integers(1, 60), guidance=st.sampled_from([1.0, 5.0]))
def test_a_kl_that_is_only_logged_costs_at_most_three_percent_of_sampling_or_one_site(groups, steps, guidance):
    config = a_config(samples=groups * 8, steps=steps, guidance=guidance, updates_per_epoch=1)
    plan = make_plan(config, num_processes=1, num_stochastic=steps)
    assert plan.branches <= plan.reference_rows
    assert plan.reference_rows <= max(plan.branches, 0.03 * plan.sampling_rows)


@given(processes=st.integers(1, 6), groups=st.integers(1, 12), group=st.integers(1, 6))
def test_a_plan_with_a_group_on_two_processes_is_refused_with_sizes_that_work(processes, groups, group):
    assume(groups > 1 and groups * group >= processes)

    def whole(samples):
        owner = {i: rank for rank in range(processes) for i in share(samples, rank=rank, count=processes)}
        return all(len({owner[g * group + j] for j in range(group)}) == 1 for g in range(samples // group))

    def plan(samples):
        config = a_config(samples=samples, group=group, advantages=AdvantageConfig(baseline="batch"))
        return make_plan(config, num_processes=processes, num_stochastic=50)

    assert plan(groups * group).whole_groups == whole(groups * group)
    if whole(groups * group):
        check_whole_groups(plan(groups * group))
        return
    with pytest.raises(PlanError, match="batch.samples_per_epoch must be a multiple of") as refused:
        check_whole_groups(plan(groups * group))
    named = str(refused.value).rpartition("nearest possible: ")[2].split(" or ")
    for size in map(int, named):
        assert whole(size)
        check_whole_groups(plan(size))


def test_a_session_with_a_groupwise_reward_needs_whole_groups():
    policy = SimpleNamespace(
        schedule=SimpleNamespace(stochastic_steps=range(50)),
        sampler=SamplerConfig(),
        rule=SimpleNamespace(branches=2),
        check_inputs=lambda *inputs: None,
    )
    processes = SimpleNamespace(count=2, rank=0)
    reward = WeightedSum([RewardTerm(name="diversity")])
    loaded = Loaded(policy=policy, reward=reward, heldout=None, prompts=[], evaluation_prompts=[])
    config = a_config(samples=9, group=3)
    with pytest.raises(PlanError, match=r"multiple of 6 \(2 processes x 3.* got 9, nearest possible: 6 or 12"):
        make_session(config, loaded, processes, None)


def test_whole_groups_are_asked_for_before_weights_load(tmp_path):
    config = dataclasses.replace(
        a_config(samples=9, group=3),
        rewards=(RewardTerm(name="diversity"),),
        run=RunConfig(output_dir=str(tmp_path)),
        tracking=TrackingConfig(trackers=()),
    )
    preflight(config, num_processes=3)
    with pytest.raises(PlanError, match="got 9, nearest possible: 6 or 12"):
        preflight(config, num_processes=2)


@pytest.mark.parametrize(
    ("changes", "weighs"),
    [
        ({}, False),
        ({"kl": FixedKL(alpha=0.1)}, True),
        ({"kl": AdaptiveKL(target=1.0)}, True),
        ({"constraints": (Constraint(reward="kl", at_most=1.0),)}, True),
        ({"constraints": (Constraint(reward="brightness", at_most=1.0),)}, False),
    ],
)
def test_a_bound_on_the_kl_is_a_weight_of_it(changes, weighs):
    config = dataclasses.replace(a_config(samples=160, steps=10), **changes)
    plan = make_plan(config, num_processes=1, num_stochastic=9)
    assert config.weighs_kl is weighs
    assert plan.keeps_reference is weighs
    assert plan.reference_rows == (2 * 160 * 9 if weighs else 2 * 48)


def test_guidance_doubles_no_rows_where_it_is_an_input_of_distilled_weights():
    """192 images of 16 steps on FLUX.1-dev are 3,072 rows; on SD 3.5, whose guidance has two branches, 6,144."""
    flux = dataclasses.replace(load_config("flux_hps"), kl=FixedKL(alpha=0.1))  # else flat groups may take fewer
    plan = expected_plan(flux, num_processes=8)
    assert plan.sampling_rows == 3_072 and plan.branches == 1
    assert "up to" not in plan.describe()
    known = dataclasses.replace(flux, model=ModelConfig(path="stabilityai/stable-diffusion-3.5-medium"))
    plan = expected_plan(known, num_processes=8)
    assert plan.sampling_rows == 6_144
    assert "up to" not in plan.describe()


def test_what_only_the_loaded_pipeline_will_tell_is_called_an_upper_bound(tmp_path):
    flux = dataclasses.replace(load_config("flux_hps"), kl=FixedKL(alpha=0.1))
    elsewhere = dataclasses.replace(flux, model=ModelConfig(path="someone/something"))
    text = expected_plan(elsewhere, num_processes=8).describe()
    assert "denoiser rows up to " in text
    assert "training      9 of 15 stochastic steps" in text, "all but the last step of a flow have noise"
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    local = dataclasses.replace(flux, model=dataclasses.replace(flux.model, path=str(tmp_path)))
    assert expected_plan(local, num_processes=8) == expected_plan(flux, num_processes=8)
    text = expected_plan(a_config(steps=10, kl=0.1), num_processes=1).describe()
    assert "training      up to 10 of 10 stochastic steps" in text
    assert "denoiser rows up to " in text
