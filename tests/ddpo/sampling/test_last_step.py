"""`sampler.last_step`: `noisy`, every step has a density, at an end that the image hardly shows; or `pretrained`."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ddpo import LoraConfig, Policy, SamplerConfig, rollout, sample_seeds
from ddpo.loading import SHAPES, load_pipeline
from ddpo.pipeline.scheduler import FLOW_END_NOISE, noise_grid
from ddpo.sampling.samplers import FLOW_ONLY, epoch_schedule, make_schedule, transition
from ddpo.sampling.step_selection import StepSelection
from ddpo.trajectory import Keep
from tests.ddpo.families import tiny_sd3, tiny_sdxl
from tests.ddpo.tools import perturb

T = 10


def schedule_of(scheduler, kind="ddim", eta=1.0, last_step="noisy"):
    config = SamplerConfig(kind=kind, num_steps=T, eta=eta, last_step=last_step)
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler.set_timesteps(T)
    grid = noise_grid(scheduler, ends_noisy=config.ends_noisy)
    return make_schedule(config, grid, model_time=scheduler.timesteps, is_flow=is_flow, clip=None)


def vp(**options):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, **options
    )


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_vp_chain_ends_where_stable_diffusion_ends(eta, prediction):
    """diffusers' own scheduler with set_alpha_to_one: false is the oracle; ours is given one with true."""
    options = {"timestep_spacing": "trailing", "prediction_type": prediction}
    ours = schedule_of(vp(set_alpha_to_one=True, **options), eta=eta)
    stock = vp(set_alpha_to_one=False, **options)
    stock.set_timesteps(T)
    x, output, noise = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k, t in enumerate(stock.timesteps):
        expected = stock.step(output, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        found = transition(ours, k, x, output, kind=prediction).sample(noise)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # diffusers' alphas are float32
    assert ours.stochastic.all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
def test_every_vp_step_has_noise_whatever_the_spacing(spacing, to_one, offset):
    scheduler = vp(set_alpha_to_one=to_one, timestep_spacing=spacing, steps_offset=offset)
    schedule = schedule_of(scheduler)
    first = float((1 - scheduler.alphas_cumprod[0].double()).sqrt())
    starts_there = float(schedule.s[-1]) <= first
    assert schedule.stochastic.all()
    total = (schedule.direction[-1] ** 2 + schedule.std[-1] ** 2).sqrt()
    assert float(total) == pytest.approx(float(schedule.s[-1]) / 2 if starts_there else first)
    assert float(schedule.a_next[-1] ** 2 + total**2) == pytest.approx(1)


@pytest.mark.parametrize("kind", FLOW_ONLY)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_chain_ends_in_the_predicted_image_and_a_stated_noise(kind, shift):
    """x_T = x0_hat + noise: the image is not faded, and all its noise is the stated one, or half of the step's own."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(T, sigmas=torch.linspace(1, 0.1, T).tolist())
    config = SamplerConfig(kind=kind, num_steps=T, eta=0.7, last_step="noisy")
    schedule = make_schedule(
        config, noise_grid(scheduler, ends_noisy=True), model_time=scheduler.timesteps, is_flow=True, clip=None
    )
    assert schedule.stochastic.all() and schedule.a_next[-1] == 1
    total = (schedule.direction[-1] ** 2 + schedule.std[-1] ** 2).sqrt()
    assert float(total) == pytest.approx(FLOW_END_NOISE)
    stock = schedule_of(FlowMatchEulerDiscreteScheduler(shift=shift), kind, 0.7, "stock")
    assert stock.stochastic_steps == tuple(range(T - 1))


def test_a_flow_step_that_starts_below_that_noise_ends_at_half_of_its_own():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = schedule_of(scheduler, "flow_sde", 0.7)
    assert scheduler.sigmas[-2] < FLOW_END_NOISE
    total = (schedule.direction[-1] ** 2 + schedule.std[-1] ** 2).sqrt()
    assert float(total) == pytest.approx(float(scheduler.sigmas[-2]) / 2)


def test_a_step_outside_the_window_ends_where_the_stock_sampler_ends():
    scheduler = vp(set_alpha_to_one=True, timestep_spacing="trailing")
    noisy, ode = schedule_of(scheduler), schedule_of(scheduler, kind="ode")
    mixed = epoch_schedule(
        noisy, ode, StepSelection(kind="window", size=3, start=2, shift_every_epochs=0), epoch=0, seed=0
    )
    assert mixed.stochastic_steps == (2, 3, 4)
    assert mixed.a_next[-1] == 1 and mixed.direction[-1] == 0
    last = epoch_schedule(noisy, ode, StepSelection(kind="window", size=3, start=7), epoch=0, seed=0)
    assert last.stochastic_steps == (7, 8, 9)
    assert last.a_next[-1] == noisy.a_next[-1] < 1


@pytest.mark.parametrize(
    "options", [{"kind": "flow_sde", "eta": 0.7}, {"kind": "cps", "eta": 0.7}, {"kind": "ddim"}, {"kind": "ode"}]
)
def test_the_number_of_noisy_steps_is_known_before_weights_load(options):
    config = SamplerConfig(num_steps=T, last_step="noisy", **options)
    scheduler = FlowMatchEulerDiscreteScheduler() if config.kind in FLOW_ONLY else vp(set_alpha_to_one=True)
    schedule = schedule_of(scheduler, config.kind, config.eta)
    assert config.max_stochastic_steps == len(schedule.stochastic_steps) == (0 if config.kind == "ode" else T)


def end_in_pixels(policy, prompts):
    """Root mean square difference, of 255, that the last step's noise makes in the pictures of one set of states."""
    path = rollout(policy, policy.encode(prompts), sample_seeds(0, 0, range(len(prompts))))
    k = policy.schedule.num_steps - 1
    with torch.no_grad():
        clean = policy.predict(k, path.state(k), path.condition).x0
    difference = policy.decode(path.final) - policy.decode(clean)
    return 255 * float(difference.square().mean().sqrt())


def test_the_noise_that_shapes_ends_with_is_below_a_grey_level():
    sampler = SamplerConfig(num_steps=T, guidance_scale=1.0, last_step="noisy")
    policy = Policy(load_pipeline(SHAPES, dtype=torch.float32), sampler=sampler)
    assert policy.schedule.stochastic.all()
    assert 0.1 < end_in_pixels(policy, ["a red circle", "two blue squares", "a cross"] * 4) < 1.0


@pytest.mark.parametrize(
    ("make", "options"), [(tiny_sdxl, {}), (tiny_sd3, {"kind": "flow_sde", "eta": 0.7})], ids=["sdxl", "sd3"]
)
def test_the_noise_that_other_families_end_with_is_below_a_grey_level(make, options):
    sampler = SamplerConfig(num_steps=T, guidance_scale=1.0, last_step="noisy", **options)
    policy = Policy(make(), sampler=sampler)
    assert policy.schedule.stochastic.all()
    assert end_in_pixels(policy, ["a cat"] * 4) < 1.0


def test_the_ode_of_a_chain_with_a_noisy_end_is_the_stock_one():
    def images(last_step):
        sampler = SamplerConfig(kind="ddim", num_steps=4, guidance_scale=1.0, last_step=last_step)
        policy = Policy(load_pipeline(SHAPES, dtype=torch.float32), sampler=sampler).noise_free
        return rollout(policy, policy.encode(["a red circle"]), sample_seeds(0, 0, range(1))).final

    assert torch.equal(images("noisy"), images("stock"))


def test_a_last_step_without_noise_is_left_to_the_pretrained_weights():
    sampler = SamplerConfig(num_steps=4, guidance_scale=1.0, last_step="pretrained")
    policy = Policy(load_pipeline(SHAPES, dtype=torch.float32), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy)
    path = rollout(policy, policy.encode(["a red circle"]), sample_seeds(0, 0, range(1)), keep=Keep.ALL)
    state = path.state(3)
    with torch.no_grad():
        trained = policy.predict(3, state, path.condition).x0
        with policy.reference():
            pretrained = policy.predict(3, state, path.condition).x0
    assert policy.schedule.pretrained_steps == (3,) and policy.schedule.stochastic_steps == (0, 1, 2)
    assert torch.equal(path.final, pretrained) and not torch.allclose(path.final, trained, atol=1e-3)
    assert policy.noise_free.schedule.pretrained_steps == ()


def test_the_graph_of_a_chain_runs_through_the_pretrained_weights_of_its_last_step():
    sampler = SamplerConfig(num_steps=3, guidance_scale=1.0, last_step="pretrained")
    policy = Policy(load_pipeline(SHAPES, dtype=torch.float32), sampler=sampler, adapter=LoraConfig(rank=2))
    perturb(policy)
    condition, seeds = policy.encode(["a red circle"]), sample_seeds(0, 0, range(1))
    final = rollout(policy, condition, seeds, gradient=True).final
    weights = list(policy.trainable().values())
    found = torch.autograd.grad(final.sum(), weights)
    slope = sum(float((g * g).sum()) for g in found) ** 0.5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, g in zip(weights, found, strict=True):
                weight.add_(g, alpha=sign * 1e-3 / slope)
            ends.append(float(rollout(policy, condition, seeds).final.double().sum()))
            for weight, g in zip(weights, found, strict=True):
                weight.sub_(g, alpha=sign * 1e-3 / slope)
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_a_last_step_with_noise_is_the_policys_whoever_makes_the_others():
    schedule = schedule_of(vp(set_alpha_to_one=False, steps_offset=1), last_step="pretrained")
    assert schedule.pretrained_steps == () and schedule.stochastic.all()
