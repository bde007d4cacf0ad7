"""Noise levels and means of every sampler against the published formulas, written out here in float64."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from ddpo.pipeline.scheduler import clip_range, noise_grid, prediction_type, training_scheduler
from ddpo.sampling.prediction import predict
from ddpo.sampling.samplers import SamplerConfig, make_schedule, transition
from ddpo.validation import FieldError

T = 8


def flow_sigmas(shift=3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(T)
    return scheduler, scheduler.sigmas.double()


def flow_schedule(kind, eta):
    scheduler, sigmas = flow_sigmas()
    config = SamplerConfig(kind=kind, num_steps=T, eta=eta)
    grid = noise_grid(scheduler)
    return make_schedule(config, grid, model_time=scheduler.timesteps, is_flow=True, clip=None), grid, sigmas


def vp_schedule(eta, kind="ddim"):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)
    scheduler.set_timesteps(T)
    grid = noise_grid(scheduler)
    config = SamplerConfig(kind=kind, num_steps=T, eta=eta)
    return make_schedule(config, grid, model_time=scheduler.timesteps, is_flow=False, clip=None), grid, scheduler


def mean_of(schedule, k, x, velocity):
    prediction = predict(velocity, x, schedule.a[k], schedule.s[k], kind="flow")
    return schedule.a_next[k] * prediction.x0 + schedule.direction[k] * prediction.eps


def draw():
    return torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_sde_is_flow_grpos_step(eta):
    """Flow-GRPO's code: mean = x (1 + w^2/(2 s) dt) + v (1 + w^2 (1 - s)/(2 s)) dt, w = eta sqrt(s/(1-s)), dt < 0,
    where at s = 1 alone the s of the denominator 1 - s is replaced by the second sigma of the grid."""
    schedule, _, sigmas = flow_schedule("flow_sde", eta)
    for k in range(T - 1):
        x, velocity = draw()
        s, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        w = eta * (s / (1 - (sigmas[1] if s == 1 else s))).sqrt()
        mean = x * (1 + w**2 / (2 * s) * dt) + velocity * (1 + w**2 * (1 - s) / (2 * s)) * dt
        torch.testing.assert_close(schedule.std[k], w * (-dt).sqrt(), rtol=1e-10, atol=0, msg=f"std of step {k}")
        torch.testing.assert_close(mean_of(schedule, k, x, velocity), mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.1, 0.3, 1.0])
def test_dance_sde_is_dance_grpos_step(eta):
    """DanceGRPO's code: mean = x + v dt - (eta^2/2) score dt, score = -(x - (1 - s) x0) / s^2, std = eta sqrt(-dt)."""
    schedule, _, sigmas = flow_schedule("dance_sde", eta)
    for k in range(T - 1):
        x, velocity = draw()
        s, dt = sigmas[k], sigmas[k + 1] - sigmas[k]
        score = -(x - (1 - s) * (x - s * velocity)) / s**2
        mean = x + velocity * dt - 0.5 * eta**2 * score * dt
        torch.testing.assert_close(schedule.std[k], eta * (-dt).sqrt(), rtol=1e-10, atol=0)
        torch.testing.assert_close(mean_of(schedule, k, x, velocity), mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
def test_cps_is_flow_cps_step(eta):
    """Flow-CPS: x' = (1 - s') x0 + s' cos(eta pi/2) x1 + s' sin(eta pi/2) noise."""
    schedule, _, sigmas = flow_schedule("cps", eta)
    for k in range(T - 1):
        x, velocity = draw()
        s, end = sigmas[k], sigmas[k + 1]
        x0, x1 = x - s * velocity, x + (1 - s) * velocity
        mean = (1 - end) * x0 + end * math.cos(eta * math.pi / 2) * x1
        torch.testing.assert_close(schedule.std[k], end * math.sin(eta * math.pi / 2), rtol=1e-10, atol=0)
        torch.testing.assert_close(mean_of(schedule, k, x, velocity), mean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_ddim_is_equation_16_and_its_mean_equation_12(eta):
    """DDIM, arXiv:2010.02502: sigma = eta sqrt((1 - a')/(1 - a)) sqrt(1 - a/a') with their a = alphas_cumprod."""
    schedule, _, scheduler = vp_schedule(eta)
    abar = scheduler.alphas_cumprod.double()
    for k, t in enumerate(scheduler.timesteps):
        end = abar[t - 1000 // T] if t >= 1000 // T else abar[0]
        sigma = eta * ((1 - end) / (1 - abar[t])).sqrt() * (1 - abar[t] / end).sqrt()
        torch.testing.assert_close(schedule.std[k], sigma, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(schedule.direction[k], (1 - end - sigma**2).sqrt(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(schedule.a_next[k], end.sqrt(), rtol=1e-12, atol=0)


def test_ddim_with_eta_one_is_ddpms_posterior():
    """Ho et al., eq. 7: mean and variance of q(x'|x, x0) for two levels of one VP chain."""
    schedule, grid, _ = vp_schedule(1.0)
    for k in range(T - 1):
        alpha = (grid.a[k] / grid.a_next[k]) ** 2
        beta = 1 - alpha
        variance = grid.s_next[k] ** 2 / grid.s[k] ** 2 * beta
        x0, eps = draw()
        x = grid.a[k] * x0 + grid.s[k] * eps
        mean = grid.a_next[k] * beta / grid.s[k] ** 2 * x0 + alpha.sqrt() * grid.s_next[k] ** 2 / grid.s[k] ** 2 * x
        torch.testing.assert_close(schedule.std[k] ** 2, variance, rtol=1e-10, atol=0)
        torch.testing.assert_close(schedule.a_next[k] * x0 + schedule.direction[k] * eps, mean, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [None, 0.5, 1.0])
def test_ddpm_is_the_step_of_the_ddpm_scheduler_with_and_without_clipping(clip, prediction):
    options = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "prediction_type": prediction}
    stock = DDPMScheduler(**options)
    ours = training_scheduler(stock)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(T)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    config = SamplerConfig(kind="ddpm", num_steps=T)
    schedule = make_schedule(config, noise_grid(ours), model_time=ours.timesteps, is_flow=False, clip=clip_range(ours))
    for k, t in enumerate(stock.timesteps):
        x, output = torch.randn(2, 4, 5, dtype=torch.float64)
        noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        theirs = stock.step(output, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
        step = transition(schedule, k, x, output, kind=prediction_type(ours))
        torch.testing.assert_close(step.sample(noise), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm_is_the_step_of_the_lcm_scheduler_but_for_its_boundary_condition(prediction):
    """LCMScheduler blends the predicted x0 with c_skip of the state, which is 0.25 / (10 t)^2 at timestep t."""
    stock = LCMScheduler(prediction_type=prediction)
    assert training_scheduler(stock) is stock
    stock.set_timesteps(T)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    config = SamplerConfig(kind="lcm", num_steps=T)
    schedule = make_schedule(config, noise_grid(stock), model_time=stock.timesteps, is_flow=False, clip=None)
    assert schedule.stochastic_steps == tuple(range(T - 1))
    for k, t in enumerate(stock.timesteps):
        x, output = torch.randn(2, 4, 5, dtype=torch.float64)
        noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        theirs = stock.step(output, t, x, generator=torch.Generator().manual_seed(k)).prev_sample
        ours = transition(schedule, k, x, output, kind=prediction_type(stock)).sample(noise)
        c_skip = float(0.25 / (100 * t**2 + 0.25))
        size = float(transition(schedule, k, x, output, kind=prediction_type(stock)).mean.abs().max() + x.abs().max())
        assert float((ours - theirs).abs().max()) <= 1.01 * c_skip * size + 1e-12


def test_lcm_ends_noisy_at_the_first_noise_level_where_that_is_asked_for():
    stock = LCMScheduler()
    stock.set_timesteps(T)
    config = SamplerConfig(kind="lcm", num_steps=T, last_step="noisy")
    grid = noise_grid(stock, ends_noisy=True)
    schedule = make_schedule(config, grid, model_time=stock.timesteps, is_flow=False, clip=None)
    torch.testing.assert_close(schedule.std[-1] ** 2, 1 - stock.alphas_cumprod[0].double())
    assert schedule.direction.abs().max() == 0


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_exact_samplers_keep_the_marginals(eta):
    """direction^2 + std^2 = s'^2: with a perfect network, x' = a' x0 + s' noise in law."""
    flow, flow_grid, _ = flow_schedule("cps", eta)
    vp, vp_grid, _ = vp_schedule(eta)
    for schedule, grid in ((flow, flow_grid), (vp, vp_grid)):
        total = schedule.direction**2 + schedule.std**2
        torch.testing.assert_close(total, grid.s_next**2, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(schedule.a_next, grid.a_next, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_euler_samplers_keep_the_marginal_variance_to_first_order_in_the_step(kind):
    """The defect of the marginal variance, (direction^2 + std^2 - s'^2), falls as the square of the step."""
    defects = []
    for num_steps in (20, 40, 80):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=torch.linspace(0.8, 0.2, num_steps).tolist())
        grid = noise_grid(scheduler)
        config = SamplerConfig(kind=kind, num_steps=num_steps, eta=0.5)
        schedule = make_schedule(config, grid, model_time=scheduler.timesteps, is_flow=True, clip=None)
        defects.append((schedule.direction**2 + schedule.std**2 - grid.s_next**2)[:-1].abs().max())
    orders = [math.log2(before / after) for before, after in zip(defects[:-1], defects[1:], strict=True)]
    assert all(1.8 < order < 2.2 for order in orders), orders


def test_a_first_sigma_that_is_one_up_to_rounding_is_one():
    """With shift 1.18 float32 rounds it to 1 - 6e-8, and sqrt(s/(1-s)) would be 4,096."""
    scheduler, sigmas = flow_sigmas(1.18)
    assert 0 < 1 - sigmas[0] < 1e-6
    config = SamplerConfig(kind="flow_sde", num_steps=T, eta=0.7)
    schedule = make_schedule(config, noise_grid(scheduler), model_time=scheduler.timesteps, is_flow=True, clip=None)
    s, end = sigmas[0], sigmas[1]
    torch.testing.assert_close(schedule.std[0], 0.7 * (s / (1 - end)).sqrt() * (s - end).sqrt())
    assert (schedule.std < 1).all()


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ode"])
def test_noise_that_rises_is_refused(kind):
    """Mochi's sigmas run from 0 to 1."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    scheduler.set_timesteps(T)
    config = SamplerConfig(kind=kind, num_steps=T, eta=0.7)
    with pytest.raises(ValueError, match=r"rises from 0 to .* at step 0, .*invert_sigmas: false"):
        make_schedule(config, noise_grid(scheduler), model_time=scheduler.timesteps, is_flow=True, clip=None)


def test_a_step_without_a_noise_level_is_refused():
    """Two sigmas of 1 at the start leave nothing to stand in for the level at s = 1."""
    scheduler, _ = flow_sigmas()
    scheduler.sigmas[1] = 1.0
    config = SamplerConfig(kind="flow_sde", num_steps=T, eta=0.7)
    with pytest.raises(ValueError, match=r"'flow_sde' has the noise levels \[nan, .*another sampler"):
        make_schedule(config, noise_grid(scheduler), model_time=scheduler.timesteps, is_flow=True, clip=None)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ode"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_samplers_are_finite_and_their_last_step_is_deterministic(kind, eta):
    schedule, _, _ = flow_schedule(kind, eta)
    for value in (schedule.std, schedule.direction, schedule.a_next):
        assert value.isfinite().all()
    expected = () if kind == "ode" or eta == 0 else tuple(range(T - 1))
    assert schedule.stochastic_steps == expected


def test_ode_is_the_euler_step_of_flow_matching():
    schedule, _, sigmas = flow_schedule("ode", 1.0)
    for k in range(T):
        x, velocity = draw()
        expected = x + velocity * (sigmas[k + 1] - sigmas[k])
        torch.testing.assert_close(mean_of(schedule, k, x, velocity), expected, rtol=1e-9, atol=1e-9)


def test_ode_ignores_eta_and_equals_ddim_without_noise():
    ode, _, _ = vp_schedule(1.0, kind="ode")
    ddim, _, _ = vp_schedule(0.0)
    assert torch.equal(ode.direction, ddim.direction)
    assert ode.stochastic_steps == ddim.stochastic_steps == ()


def test_a_sampler_of_the_other_family_is_refused_with_the_ones_that_fit():
    with pytest.raises(ValueError, match="sampler.kind must be ode, flow_sde, .* a flow-matching model, got 'ddim'"):
        flow_schedule("ddim", 1.0)
    with pytest.raises(ValueError, match="sampler.kind must be ddim, ddpm, lcm or ode with a VP model, got 'flow_sde'"):
        vp_schedule(1.0, kind="flow_sde")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("eta", -0.1), ("eta", 1.5), ("guidance_scale", -1.0), ("height", 4), ("width", 0)],
)
def test_a_sampler_out_of_range_is_refused_with_its_field_and_value(field, value):
    with pytest.raises(FieldError, match=rf"{field} must be .*got {value}"):
        SamplerConfig(**{field: value})


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_predictions_invert_the_forward_marginal(kind):
    x0, eps = draw()
    a, s = (torch.tensor(0.6), torch.tensor(0.8)) if kind != "flow" else (torch.tensor(0.3), torch.tensor(0.7))
    a, s = a.double(), s.double()
    output = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[kind]
    # 0.6 and 0.8 are exact neither in float32 nor in float64: v needs a^2 + s^2 = 1.
    s = (1 - a**2).sqrt() if kind == "v_prediction" else s
    output = a * eps - s * x0 if kind == "v_prediction" else output
    prediction = predict(output, a * x0 + s * eps, a, s, kind=kind)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)


def test_an_unknown_prediction_type_is_refused():
    x, output = draw()
    with pytest.raises(ValueError, match="flow_prediction"):
        predict(output, x, torch.tensor(0.5), torch.tensor(0.5), kind="flow_prediction")
