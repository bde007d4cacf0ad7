"""Which noise schedule a pipeline's scheduler is read as."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)

from ddpo.pipeline.scheduler import clip_range, noise_grid, prediction_type, training_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVERS = (
    PNDMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_other_vp_solvers_keep_their_noise_schedule_and_prediction(solver, prediction):
    scheduler = solver(**BETAS, prediction_type=prediction, timestep_spacing="trailing", steps_offset=1)
    converted = training_scheduler(scheduler)
    assert isinstance(converted, DDIMScheduler)
    assert torch.equal(converted.alphas_cumprod, scheduler.alphas_cumprod)
    assert prediction_type(converted) == prediction
    assert converted.config.timestep_spacing == scheduler.config.timestep_spacing
    assert converted.config.steps_offset == scheduler.config.steps_offset


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS, CogVideoXDDIMScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, UnCLIPScheduler],
)
def test_a_solver_left_at_its_own_defaults_keeps_its_noise_schedule(solver):
    scheduler = solver()
    converted = training_scheduler(training_scheduler(scheduler))
    torch.testing.assert_close(converted.alphas_cumprod.double(), scheduler.alphas_cumprod.double(), rtol=0, atol=1e-7)
    if not converted.config.set_alpha_to_one:
        assert converted.final_alpha_cumprod == converted.alphas_cumprod[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_vp_solvers_do_not_start_to_clip(solver):
    assert clip_range(training_scheduler(solver(**BETAS))) is None


def test_pndm_of_stable_diffusion_becomes_the_same_ddim_as_stable_diffusion_ships():
    converted = training_scheduler(PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))
    shipped = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    for scheduler in (converted, shipped):
        scheduler.set_timesteps(20)
    assert torch.equal(converted.timesteps, shipped.timesteps)
    for field in ("a", "s", "a_next", "s_next"):
        assert torch.equal(getattr(noise_grid(converted), field), getattr(noise_grid(shipped), field))


def test_ddpm_keeps_its_clipping():
    converted = training_scheduler(DDPMScheduler(**BETAS, clip_sample=True, clip_sample_range=1.5))
    assert clip_range(converted) == 1.5


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_dynamic_thresholding_is_refused(scheduler_class):
    with pytest.raises(ValueError, match="thresholding"):
        training_scheduler(scheduler_class(**BETAS, thresholding=True))


def test_a_scheduler_of_unknown_noise_is_refused_by_name():
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        training_scheduler(EDMEulerScheduler())


def test_a_flow_matching_setting_of_a_vp_solver_is_refused():
    """Sana's scheduler: it has alphas_cumprod, but the model was not trained on them."""
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    with pytest.raises(ValueError, match="flow"):
        training_scheduler(scheduler)


def test_flow_matching_grid_is_one_minus_sigma_and_sigma():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    assert training_scheduler(scheduler) is scheduler
    grid = noise_grid(scheduler)
    torch.testing.assert_close(grid.a + grid.s, torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(grid.s_next[:-1], grid.s[1:])
    assert grid.s_next[-1] == 0
    assert prediction_type(scheduler) == "flow"


def test_vp_grid_has_unit_variance():
    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(13)
    grid = noise_grid(scheduler)
    torch.testing.assert_close(grid.a**2 + grid.s**2, torch.ones(13, dtype=torch.float64))
    torch.testing.assert_close(grid.a_next**2 + grid.s_next**2, torch.ones(13, dtype=torch.float64))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_noise_prediction_at_zero_terminal_signal_is_refused_with_the_cure(spacing):
    scheduler = DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=f"timestep_spacing: {spacing}.*Set timestep_spacing: leading"):
        noise_grid(scheduler)


@pytest.mark.parametrize(("spacing", "prediction"), [("leading", "epsilon"), ("trailing", "v_prediction")])
def test_zero_terminal_signal_is_no_matter_where_nothing_is_divided_by_it(spacing, prediction):
    scheduler = DDIMScheduler(
        **BETAS, rescale_betas_zero_snr=True, timestep_spacing=spacing, prediction_type=prediction
    )
    scheduler.set_timesteps(10)
    assert noise_grid(scheduler).s.isfinite().all()
