"""Runs a pipeline on a few prompts of different lengths, to see what of its calls depends on what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin

from ddpo.pipeline.call import PipelineCall
from ddpo.pipeline.foreign_inputs import more_inputs
from ddpo.pipeline.input_images import IMAGE, Inputs, probe_inputs
from ddpo.pipeline.latent_place import BESIDE, find_place
from ddpo.pipeline.nested import same
from ddpo.pipeline.tracing import Step, UntraceableError, first_line
from ddpo.pipeline.used_layers import called_layers

# Of unequal lengths, to see what depends on them; the last is long, as some pipelines pad to a multiple of 16 tokens.
PROBE_PROMPTS = ("a", "a b", " ".join(["a b c"] * 20))


class Trace(Protocol):
    """Runs a pipeline; see `ddpo.pipeline.tracing.trace`."""

    def __call__(
        self,
        prompts: Sequence[str],
        images: Sequence[Inputs] | None,
        *,
        num_steps: int | None = None,
        hollow: bool = True,
    ) -> list[Step]:
        """The steps of a run on these prompts and input images, at most `num_steps` of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What a pipeline does with a few prompts.

    Attributes:
        one: The first step of a hollow run with one prompt.
        steps: All steps of one with two prompts; of a pipeline that takes one at a time, with the second.
        three: The first step of one with three; there with the third.
        real: The first step of the real loop for two prompts, together or one after the other.
        used: Names of the modules that the network's forward pass called in it.
    """

    one: Step
    steps: list[Step]
    three: Step
    real: tuple[Step, ...]
    used: frozenset[str]


def probe(pipeline: DiffusionPipeline, denoiser: ModelMixin, call: PipelineCall, run: Trace) -> Probes:
    """Runs a pipeline on a few prompts.

    Args:
        pipeline: The stock pipeline.
        denoiser: Its denoiser.
        call: How it is called.
        run: Runs it.

    Raises:
        UntraceableError: It cannot be called this way, or not as a chain of equal steps.
    """
    name = type(pipeline).__name__

    def tried(count: int, num_steps: int | None = None, *, hollow: bool = True) -> list[Step]:
        images = probe_inputs(call.inputs, count, call.image_size) if call.image_size else None
        rows = slice(count - 1 if call.alone else 0, count)
        return run(PROBE_PROMPTS[rows], images and images[rows], num_steps=num_steps, hollow=hollow)

    try:
        with called_layers(denoiser) as used:
            first = tried(1, num_steps=1, hollow=False)  # before all others: it shows the form of the network's output
        (one,) = tried(1, num_steps=1)
        (three,) = tried(3, num_steps=1)
        second = tried(2, num_steps=1, hollow=False)
        steps = tried(2)  # last: the scheduler keeps the timesteps of this run
    except (UntraceableError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the pipeline's own code raises, it cannot be called like this
        inputs = "an image" if call.inputs == (IMAGE,) else " and ".join(call.inputs)
        given = f"prompts, {inputs} for each, and noise" if inputs else "prompts and noise alone"
        sizes = [str(call.fixed[side]) for side in ("width", "height") if side in call.fixed]
        size = f" at {'x'.join(sizes)} pixels" if sizes else ""
        raise UntraceableError(
            f"{name} fails when it is called from {given}{size}{more_inputs(pipeline)}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    _check_steps(name, one, steps, three)
    scheduled = len(pipeline.scheduler.timesteps)
    if len(steps) != scheduled:
        raise UntraceableError(f"{name} makes {len(steps)} steps where its scheduler has {scheduled}")
    real = (*first, *second) if call.alone else (*second,)
    return Probes(one=one, steps=steps, three=three, real=real, used=frozenset(used))


def _check_steps(name: str, one: Step, steps: Sequence[Step], three: Step) -> None:
    """Refuses steps that are not all alike."""
    if one.calls[0].latents.shape[1:] != three.calls[0].latents.shape[1:]:
        raise UntraceableError(
            f"{name} hands its denoiser more for three prompts than for one: it takes the images of a batch together, "
            "not one for each prompt"
        )
    if len({tuple(call.latents.shape for call in step.calls) for step in steps}) > 1:
        raise UntraceableError(f"{name} calls its denoiser differently at different steps; one rule must fit all")
    first = steps[0]
    changing = next((argument for step in steps for argument in differing(first, step)), None)
    if changing is not None:
        raise UntraceableError(f"{name} changes {changing} of its denoiser from step to step; it must stay the same")
    if any(not torch.equal(step.sample, first.sample) for step in steps):
        raise UntraceableError(
            f"{name} changes the latents between its scheduler's steps, as those that keep a part of an image do whose "
            "network sees no mask; a policy's chain is the scheduler's alone"
        )
    if any(not torch.equal(step.model_output, first.model_output) for step in steps):
        raise UntraceableError(
            f"{name} guides differently at different steps: of the same denoiser outputs it makes others; one rule "
            "must fit all"
        )


def differing(step: Step, other: Step) -> Iterator[str]:
    """Names of what the denoiser's calls at two steps do not share, besides the latents and the time."""
    place = find_place(step)
    for call, later in zip(step.calls, other.calls, strict=True):
        if place.axis is not None and not torch.equal(place.beside(call.latents), place.beside(later.latents)):
            yield BESIDE
        for name in {**call.arguments, **later.arguments}:
            if not same(call.arguments.get(name), later.arguments.get(name)):
                yield name
