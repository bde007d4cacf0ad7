"""Small things that several tests need."""

from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler

from ddpo import LoraConfig, Policy, SamplerConfig
from tests.tiny import tiny_stable_diffusion

PROMPTS = ["a cat", "two dogs", "red house", "a blue square, a red circle"]


SIZE = {"height": 16, "width": 16}
LORA = LoraConfig(rank=4)


def make_policy(*, adapter=LORA, precision="fp32", pipeline=None, seed=0, **sampler):
    """A policy on the tiny Stable Diffusion, four steps of 8x8 latents unless told otherwise."""
    config = SamplerConfig(**{"num_steps": 4, **SIZE, **sampler})
    pipeline = pipeline if pipeline is not None else tiny_stable_diffusion()
    return Policy(pipeline, sampler=config, adapter=adapter, precision=precision, seed=seed)


def scheduled(**options):
    """The tiny pipeline with exactly these scheduler options; its constructor would correct some of them."""
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    return pipeline


def perturb(policy, *, scale=0.1, seed=1):
    """Moves every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def prior(policy, count, seed=5):
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def counting_calls(module):
    """Counts real forward passes of a module."""
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def record_stock(pipeline, **arguments):
    """Runs a stock pipeline and returns (result, [(timestep, sample, model_output) of every scheduler step])."""
    seen, scheduler = [], pipeline.scheduler
    step = type(scheduler).step

    def recording(model_output, timestep, sample, **options):
        seen.append((timestep, sample.clone(), model_output.clone()))
        return step(scheduler, model_output, timestep, sample, **options)

    scheduler.step = recording
    try:
        result = pipeline(**arguments)
    finally:
        del scheduler.step
    return result, seen
