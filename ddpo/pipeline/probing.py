"""What a policy learns of a pipeline by running it with a hollow denoiser: schedule, arguments and guidance."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import ImageOps
from torch import Tensor

from ddpo.pipeline.call import Batch, PipelineCall, read_call
from ddpo.pipeline.denoiser import Denoiser
from ddpo.pipeline.guidance import GuidanceRule, find_rules, rounding
from ddpo.pipeline.input_images import Inputs, probe_inputs
from ddpo.pipeline.posterior import posterior_means
from ddpo.pipeline.probes import PROBE_PROMPTS, Probes, differing, probe
from ddpo.pipeline.scheduler import check_sampler, clip_range, noise_grid, prediction_type
from ddpo.pipeline.tracing import Step, UntraceableError, trace
from ddpo.sampling.samplers import SamplerConfig, make_schedule
from ddpo.sampling.schedule import PredictionType, Schedule
from ddpo.trajectory import Condition
from ddpo.validation import UserError

_LOG = logging.getLogger(__name__)
BATCH_ROUNDING = 32  # how much more than a repeated call a batch may differ from its rows alone
MUCH_SIGNAL = 0.2  # Stable Diffusion starts at 0.08 in 50 steps and at 0.24 in 4


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A pipeline as it was found.

    Attributes:
        denoiser: The network with the arguments that every call of it shares.
        call: How it is called.
        kind: What its network predicts.
        latent_shape: Shape of one sample's latents.
        noisy: The chain with noise in every step, float32 on the device.
        ode: The same chain without noise.
        rule: Its way to guide, found by comparing with its own output.
        used: Names of the modules that the network's forward pass calls.
    """

    denoiser: Denoiser
    call: PipelineCall
    kind: PredictionType
    latent_shape: tuple[int, ...]
    noisy: Schedule
    ode: Schedule
    rule: GuidanceRule
    used: frozenset[str]


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
        UserError: The sampler does not fit the model.
    """
    check_sampler(pipeline.scheduler, sampler.kind)
    with _unwarned(), denoiser.autocast():
        call, probes = _probe(pipeline, denoiser.module, call, sampler)
        _check_chance(pipeline, denoiser.module, call, probes.one)
    steps = probes.steps
    kind = prediction_type(pipeline.scheduler)
    times = torch.stack([step.calls[0].timestep.amax() for step in steps])

    def schedule(sampler: SamplerConfig) -> Schedule:
        scheduler = pipeline.scheduler
        made = make_schedule(
            sampler,
            noise_grid(scheduler, ends_noisy=sampler.ends_noisy),
            model_time=times,
            is_flow=kind == "flow",
            clip=clip_range(scheduler),
        )
        return made.to(denoiser.device, torch.float32)

    noisy, ode = schedule(sampler), schedule(replace(sampler, kind="ode"))
    if noisy.a[0] > MUCH_SIGNAL:
        _LOG.warning(
            "sampling starts from pure noise at timestep %g, where the model expects %.0f%% of a picture's signal: "
            "with so few steps set timestep_spacing: trailing in the scheduler's config", times[0], 100 * noisy.a[0],
        )  # fmt: skip
    denoiser.learn_arguments(probes.one, steps[0], probes.three, alone=call.alone)
    denoiser.learn_experts(steps)
    denoiser.output_type = probes.real[0].model_output.dtype
    scale, rescale = sampler.guidance_scale, sampler.guidance_rescale
    rules = find_rules(steps[0], denoiser.outputs(steps[0]), scale, rescale=rescale)
    with denoiser.autocast():
        rule = _confirmed(type(pipeline).__name__, denoiser, rules, scale, noisy.model_time[0], probes.real)
    return Reading(
        denoiser=denoiser,
        call=call,
        kind=kind,
        latent_shape=tuple(steps[0].sample.shape[1:]),
        noisy=noisy,
        ode=ode,
        rule=rule,
        used=_adaptable(probes.used, denoiser, noisy),
    )


def _adaptable(used: frozenset[str], denoiser: Denoiser, noisy: Schedule) -> frozenset[str]:
    """Names of the modules that a noisy step calls; of several networks, which are alike, the first step saw one."""
    if not denoiser.experts:
        return used
    trained = {denoiser.experts[k] for k in noisy.stochastic_steps} or set(denoiser.experts)
    return frozenset(f"{expert}.{name.partition('.')[2]}" for expert in trained for name in used)


@torch.no_grad()
def _confirmed(
    name: str, denoiser: Denoiser, rules: Sequence[GuidanceRule], scale: float, time: Tensor, real: Sequence[Step]
) -> GuidanceRule:
    """The first rule under which our own calls of the network give what the pipeline's do, on two prompts.

    Args:
        name: The pipeline's.
        denoiser: Its denoiser; told whether it makes no batches.
        rules: Guidance rules that fit the hollow trace; all make the same calls.
        scale: Guidance as the pipeline defines it.
        time: Of the first step, in the denoiser's unit.
        real: The first step of the real loop for both prompts, or for each.

    Raises:
        UntraceableError: None does.
    """

    def replayed(step: Step, condition: Condition, rule: GuidanceRule) -> Tensor:
        return rule.combine(*denoiser.branches(step.sample, time.expand(len(step.sample)), condition, rule), scale)

    def error(rule: GuidanceRule) -> float:
        off = [replayed(step, denoiser.condition(step, rule), rule) - step.model_output for step in real]
        return max(float(one.abs().max()) / rounding(step.model_output) for one, step in zip(off, real, strict=True))

    rule = next((rule for rule in rules if error(rule) <= 1), None)
    if rule is None:
        off = error(rules[0]) * rounding(real[0].model_output)
        raise UntraceableError(
            f"{name} makes another model output of its denoiser's than a policy does, off by {off:.2g} under the "
            f"guidance rule {rules[0].name}: its network depends on more than its arguments"
        )
    conditions = [denoiser.condition(step, rule) for step in real]
    if len(real) > 1:  # the pipeline makes no batches, and its network may not either
        sample = torch.cat([step.sample for step in real])
        output = torch.cat([step.model_output for step in real])
        ours = replayed(replace(real[0], sample=sample), Condition.concatenate(conditions), rule)
        denoiser.one_row = not float((ours - output).abs().max()) <= BATCH_ROUNDING * rounding(output)
    return rule


def _check_chance(pipeline: DiffusionPipeline, module: ModelMixin, call: PipelineCall, one: Step) -> None:
    """Refuses a pipeline that draws more than its initial latents, or that draws these around an image."""
    images = probe_inputs(call.inputs, 1, call.image_size) if call.image_size else None
    if call.image_size:
        turned = [{name: ImageOps.flip(image) for name, image in inputs.items()} for inputs in images or ()]
        (seen,) = recorded_steps(pipeline, module, call, PROBE_PROMPTS[:1], turned, num_steps=1)
        if not torch.equal(seen.sample, one.sample):
            raise UntraceableError(
                f"{type(pipeline).__name__} starts from an image with noise on it; a policy starts from noise"
            )
    (other,) = recorded_steps(pipeline, module, call, PROBE_PROMPTS[:1], images, num_steps=1, seed=1)
    drawn = [*dict.fromkeys(differing(one, other))]
    if drawn:
        raise UntraceableError(
            f"{type(pipeline).__name__} draws {', '.join(drawn)} of its denoiser at random: a policy encodes a prompt "
            "once, and all its samples would share one draw"
        )


def recorded_steps(
    pipeline: DiffusionPipeline,
    module: ModelMixin,
    call: PipelineCall,
    prompts: Sequence[str],
    images: Sequence[Inputs] | None,
    *,
    num_steps: int | None = None,
    hollow: bool = True,
    seed: int = 0,
) -> list[Step]:
    """The recorded steps of a run on these prompts and input images; see `ddpo.pipeline.tracing.trace`."""
    generator = torch.Generator().manual_seed(seed)
    output = "pt" if pipeline.components.get("vae") is None else "latent"  # nothing to decode, or not wanted
    arguments = call.arguments(prompts, images=images, output_type=output, generator=generator)
    with torch.no_grad(), call.guiding(pipeline), posterior_means(pipeline):
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
) -> tuple[PipelineCall, Probes]:
    """What the pipeline does with a few prompts, called in the first way that it takes.

    Several prompts at a time are tried before one, an image for each before none, guidance without a negative prompt
    before with one; the message is that of the first way.
    """
    first: UntraceableError | None = None
    batches: tuple[Batch, ...] = ("any", "one", "scalar")
    for batch in batches:
        for with_images in (True, False):
            if not with_images and call.image_size is None:
                continue
            try:
                shape = call if with_images else read_call(pipeline, module, sampler, no_images=str(first))
            except UserError:  # it takes images alone
                continue
            for negative in (False, True) if _may_need_negative(pipeline, shape) else (False,):
                way = replace(shape, batch=batch, negative=negative)
                try:
                    return way, probe(pipeline, module, way, partial(recorded_steps, pipeline, module, way))
                except UntraceableError as error:
                    first = first or error
    assert first is not None, "one way at least was tried"
    raise first


def _may_need_negative(pipeline: DiffusionPipeline, call: PipelineCall) -> bool:
    """Whether a pipeline that guides may have failed for want of a negative prompt."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return call.guidance == "guidance_scale" and call.guidance_scale > 1 and "negative_prompt" in parameters
