"""What a policy learns of a pipeline by running it with a hollow denoiser: schedule, arguments and guidance."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL.Image import Image
from torch import Tensor

from ddpo.denoiser import Denoiser
from ddpo.guidance import GuidanceRule, find_rule, rules
from ddpo.input_images import probe_images
from ddpo.pipeline_call import PROBE_PROMPTS, PipelineCall, probe, read_call
from ddpo.samplers import SamplerConfig, make_schedule
from ddpo.schedule import PredictionType, Schedule, clip_range, noise_grid, prediction_type
from ddpo.tracing import Step, UntraceableError, trace


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A pipeline as it was found.

    Attributes:
        call: How it is called.
        kind: What its network predicts.
        latent_shape: Shape of one sample's latents.
        noisy: The chain with noise in every step, float32 on the device.
        ode: The same chain without noise.
        rule: Its way to guide, found by comparing with its own output.
    """

    call: PipelineCall
    kind: PredictionType
    latent_shape: tuple[int, ...]
    noisy: Schedule
    ode: Schedule
    rule: GuidanceRule


def read_pipeline(
    pipeline: DiffusionPipeline, denoiser: Denoiser, call: PipelineCall, sampler: SamplerConfig
) -> Reading:
    """Finds out what a pipeline does; the denoiser learns its arguments.

    Args:
        pipeline: The stock pipeline.
        denoiser: Its denoiser.
        call: How it is called, as its signature says; without input images if it takes none for each prompt.
        sampler: How it is sampled.

    Raises:
        UntraceableError: It does not fit; the message says why.
        ValueError: The sampler does not fit the model.
    """
    with _unwarned():
        call, steps, one, three = _probe(pipeline, denoiser.module, call, sampler)
    kind = prediction_type(pipeline.scheduler)
    times = torch.stack([step.calls[0].timestep.flatten()[0] for step in steps])

    def schedule(sampler: SamplerConfig) -> Schedule:
        scheduler = pipeline.scheduler
        made = make_schedule(
            sampler,
            noise_grid(scheduler),
            model_time=times,
            is_flow=kind == "flow",
            clip=clip_range(scheduler),
        )
        return made.to(denoiser.device, torch.float32)

    noisy, ode = schedule(sampler), schedule(replace(sampler, kind="ode"))
    denoiser.learn_arguments(one, steps[0], three)
    prompts = PROBE_PROMPTS[:2]
    with denoiser.autocast():
        images = probe_images(len(prompts), call.image_size) if call.image_size else None
        (real,) = recorded_steps(pipeline, denoiser.module, call, prompts, images, num_steps=1, hollow=False)
    denoiser.output_type = real.model_output.dtype

    @torch.no_grad()
    def replayed(rule: GuidanceRule, step: Step) -> Tensor:
        """The model output of a recorded first step, by our own call under `rule`."""
        condition, time = denoiser.condition(prompts, step, rule), noisy.model_time[0].expand(len(step.sample))
        return rule.combine(*denoiser.branches(step.sample, time, condition, rule), sampler.guidance_scale)

    return Reading(
        call=call,
        kind=kind,
        latent_shape=tuple(steps[0].sample.shape[1:]),
        noisy=noisy,
        ode=ode,
        rule=find_rule(real, replayed, rules(rescale=sampler.guidance_rescale)),
    )


def recorded_steps(
    pipeline: DiffusionPipeline,
    module: ModelMixin,
    call: PipelineCall,
    prompts: Sequence[str],
    images: Sequence[Image] | None,
    *,
    num_steps: int | None = None,
    hollow: bool = True,
) -> list[Step]:
    """The recorded steps of a run on these prompts and input images; see `ddpo.tracing.trace`."""
    generator = torch.Generator().manual_seed(0)
    output = "pt" if pipeline.components.get("vae") is None else "latent"  # nothing to decode, or not wanted
    arguments = call.arguments(prompts, images=images, output_type=output, generator=generator)
    with torch.no_grad():
        return trace(pipeline, module, arguments, num_steps=num_steps, hollow=hollow)


@contextmanager
def _unwarned() -> Iterator[None]:
    """The libraries' warnings held back: that a probe's prompt is cut off tells the user nothing."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _probe(
    pipeline: DiffusionPipeline, module: ModelMixin, call: PipelineCall, sampler: SamplerConfig
) -> tuple[PipelineCall, list[Step], Step, Step]:
    """What the pipeline does with a few prompts; from prompts alone where an image for each is not taken."""

    def probed(call: PipelineCall) -> tuple[PipelineCall, list[Step], Step, Step]:
        return call, *probe(pipeline, partial(recorded_steps, pipeline, module, call), call.image_size)

    try:
        return probed(call)
    except UntraceableError as error:
        if call.image_size is None:
            raise
        alone = read_call(pipeline, module, sampler, no_images=str(error))
        try:
            return probed(alone)
        except UntraceableError:
            raise error from None
