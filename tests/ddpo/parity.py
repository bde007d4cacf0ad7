"""Mean and std of every denoising step against `DDIMScheduler.step`. `python -m tests.ddpo.parity` prints the table.

The oracle runs in float64 (its alphas_cumprod cast to it): its mean is `step` with zero noise, its std the difference
that unit noise makes. Ours is the policy's own arithmetic, in float64 and in the float32 that ships.
"""

from itertools import product

import torch
from diffusers import DDIMScheduler

from ddpo.pipeline.scheduler import clip_range, noise_grid, prediction_type, training_scheduler
from ddpo.sampling.samplers import SamplerConfig, make_schedule, transition

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
ETAS = (0.0, 0.5, 1.0)
SHAPE = (2, 4, 3, 3)


def make_scheduler(prediction, spacing, alpha_to_one, *, clip=False, offset=1, num_steps=10, **options):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing=spacing,
        set_alpha_to_one=alpha_to_one,
        clip_sample=clip,
        steps_offset=offset,
        **options,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def policy_step(scheduler, eta, dtype):
    """`(schedule, (k, x, output) -> Gaussian)`: the policy's arithmetic around a given network output."""
    source = training_scheduler(scheduler)
    source.set_timesteps(scheduler.num_inference_steps)
    schedule = make_schedule(
        SamplerConfig(kind="ddim", num_steps=len(source.timesteps), eta=eta),
        noise_grid(source),
        model_time=source.timesteps,
        is_flow=False,
        clip=clip_range(source),
    ).to("cpu", dtype)
    return schedule, lambda k, x, output: transition(schedule, k, x, output, kind=prediction_type(source))


def oracle_step(scheduler, t, x, output, eta):
    """Mean and std of `DDIMScheduler.step` in float64."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    if eta == 0:
        return scheduler.step(output, t, x, eta=0.0, return_dict=False)[0], zero
    mean, moved = (
        scheduler.step(output, t, x, eta=eta, variance_noise=noise, return_dict=False)[0] for noise in (zero, one)
    )
    return mean, moved - mean


def errors(scheduler, eta, dtype, seed=0):
    """Largest absolute errors of mean and of std over all steps, and the schedule."""
    generator = torch.Generator().manual_seed(seed)
    schedule, step = policy_step(scheduler, eta, dtype)
    mean_error = std_error = 0.0
    for k, t in enumerate(scheduler.timesteps):
        x = torch.randn(SHAPE, generator=generator).double()
        output = torch.randn(SHAPE, generator=generator).double()
        mean, std = oracle_step(scheduler, t, x, output, eta)
        gaussian = step(k, x.to(dtype), output.to(dtype))
        mean_error = max(mean_error, float((gaussian.mean.double() - mean).abs().max()))
        std_error = max(std_error, float((gaussian.std.double() - std).abs().max()))
    return mean_error, std_error, schedule


def table(dtype=torch.float32, num_steps=(10, 7)):
    """Max errors of mean and std by (prediction type, spacing, set_alpha_to_one), over clip, offset, eta and step."""
    rows = {}
    for key in product(PREDICTIONS, SPACINGS, (False, True)):
        worst = [0.0, 0.0]
        for clip, offset, eta, steps in product((False, True), (0, 1), ETAS, num_steps):
            found = errors(make_scheduler(*key, clip=clip, offset=offset, num_steps=steps), eta, dtype)
            worst = [max(old, new) for old, new in zip(worst, found[:2], strict=True)]
        rows[key] = tuple(worst)
    return rows


def main():
    single, double = table(torch.float32), table(torch.float64)
    print("Max |error| against DDIMScheduler.step over every step of 10 and 7, eta 0, .5, 1, clip_sample on and off,")
    print("steps_offset 0 and 1; the policy's arithmetic in float32 (as shipped) and in float64.")
    heads = ("mean f32", "std f32", "mean f64", "std f64")
    print(f"{'prediction':13}{'spacing':10}{'alpha_to_one':14}" + "".join(f"{head:>10}" for head in heads))
    for (prediction, spacing, alpha_to_one), (mean, std) in single.items():
        exact = double[prediction, spacing, alpha_to_one]
        numbers = "".join(f"{value:10.1e}" for value in (mean, std, *exact))
        print(f"{prediction:13}{spacing:10}{alpha_to_one!s:14}{numbers}")


if __name__ == "__main__":
    main()
