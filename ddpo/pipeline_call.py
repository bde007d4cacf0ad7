"""What a stock pipeline's `__call__` is given: prompts or a batch size, guidance, sizes.

Pipelines differ in the names of the same few things; they are read from the signature once, when the policy is made.

    prompts    `prompt`; `batch_size` for an unconditional pipeline, whose prompts are counted and otherwise ignored
    guidance   `guidance_scale`; `true_cfg_scale` with negative prompts where `guidance_scale` is only the input of
               guidance-distilled weights and is left out by default (Qwen-Image)
    images     `image`, one a prompt, of a pipeline that edits (FLUX Kontext, Qwen-Image-Edit)
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL.Image import Image

from ddpo.input_images import DEFAULT_SIDE, IMAGE, probe_images
from ddpo.samplers import SamplerConfig
from ddpo.tracing import Step, UntraceableError, beside_noise, same

FOREIGN_INPUTS = ("mask_image", "control_image", "init_image")
BLANK = " "  # the unconditional prompt of Qwen-Image's authors; an empty one would have no token at all

# Of unequal lengths, to see what depends on them; the last is long, as some pipelines pad to a multiple of 16 tokens.
PROBE_PROMPTS = ("a", "a b", " ".join(["a b c"] * 20))


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """How to call one pipeline.

    Attributes:
        prompts: The parameter that says how many images: `prompt` or `batch_size`.
        guidance: The parameter of the guidance scale; None for a pipeline without.
        num_steps: Denoising steps.
        guidance_scale: Guidance as the pipeline defines it.
        fixed: Arguments that are always the same, such as height and width.
        image_size: (width, height) of the input image that belongs to every prompt, in pixels; None for a pipeline
            from prompts alone.
        no_images: Why there are no input images, for messages; empty with them.
    """

    prompts: str
    guidance: str | None
    num_steps: int
    guidance_scale: float
    fixed: Mapping[str, object]
    image_size: tuple[int, int] | None = None
    no_images: str = ""

    def arguments(
        self,
        prompts: Sequence[str],
        *,
        output_type: str,
        images: Sequence[Image] | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> dict[str, object]:
        """Keyword arguments of `pipeline.__call__`.

        Args:
            prompts: B texts.
            output_type: `latent` for final latents, `pt` for images in [0, 1].
            images: B input images of `image_size`; with an `image_size` only, and needed there.
            generator: Of the initial latents.
            num_steps: Default as configured.
            guidance_scale: Default as configured.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        given: dict[str, object] = {
            "num_inference_steps": self.num_steps if num_steps is None else num_steps,
            "output_type": output_type,
            **self.fixed,
        }
        given[self.prompts] = list(prompts) if self.prompts == "prompt" else len(prompts)
        assert (images is None) == (self.image_size is None), "one image a prompt, or none"
        if images is not None:
            given[IMAGE] = list(images)
        if self.guidance is not None:
            given[self.guidance] = scale
        if self.guidance == "true_cfg_scale" and scale > 1:
            given["negative_prompt"] = [BLANK] * len(prompts)
        if generator is not None:
            given["generator"] = generator
        return given


def read_call(
    pipeline: DiffusionPipeline, denoiser: ModelMixin, sampler: SamplerConfig, *, no_images: str = ""
) -> PipelineCall:
    """Reads how a pipeline is called from its signature.

    Args:
        pipeline: The stock pipeline.
        denoiser: Its denoiser.
        sampler: Steps, guidance and sizes.
        no_images: Why a pipeline that takes an `image` is to be called without; empty to give it one a prompt.

    Raises:
        UntraceableError: It takes neither prompts nor a batch size, or needs a mask or a noised image.
        ValueError: The sampler sets something that the pipeline does not take.
    """
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    prompts = next((option for option in ("prompt", "batch_size") if option in parameters), None)
    if prompts is None:
        raise UntraceableError(f"{name} takes neither prompt nor batch_size; a policy needs one to say how many images")
    foreign = [option for option in FOREIGN_INPUTS if option in parameters]
    if foreign:
        raise UntraceableError(f"{name} needs {', '.join(foreign)} besides a prompt; a policy starts from noise alone")
    if IMAGE in parameters and "strength" in parameters:
        raise UntraceableError(f"{name} starts from an image with noise on it (strength); a policy starts from noise")
    fixed = {
        option: value
        for option, value in (
            ("height", sampler.height), ("width", sampler.width), ("num_frames", sampler.num_frames),
            ("guidance_rescale", sampler.guidance_rescale or None),
        )
        if value is not None
    }  # fmt: skip
    refused = [option for option in fixed if option not in parameters]
    if refused:
        raise ValueError(f"sampler.{refused[0]} is {fixed[refused[0]]}, but {name} takes no {refused[0]}; leave it out")
    if "use_resolution_binning" in parameters and {"height", "width"} <= set(fixed):
        fixed["use_resolution_binning"] = False  # else a size that was asked for becomes the nearest of a table
    call = PipelineCall(
        prompts=prompts,
        guidance=_guidance(parameters, denoiser),
        num_steps=sampler.num_steps,
        guidance_scale=sampler.guidance_scale,
        fixed=fixed,
        no_images=no_images or f"{name} takes no image",
    )
    return _with_images(call, parameters) if IMAGE in parameters and not no_images else call


def _with_images(call: PipelineCall, parameters: Mapping[str, inspect.Parameter]) -> PipelineCall:
    """The call with an input image of the size of the pictures for every prompt."""
    size = {side: call.fixed.get(side, DEFAULT_SIDE) for side in ("height", "width")}
    width, height = size["width"], size["height"]
    assert isinstance(width, int) and isinstance(height, int)
    fixed = {**call.fixed, **size}
    if "max_area" in parameters:
        fixed["max_area"] = width * height  # else a size that was asked for becomes another of a megapixel
    if "_auto_resize" in parameters and size != dict.fromkeys(size, DEFAULT_SIDE):
        fixed["_auto_resize"] = False  # the same for the input image
    return replace(call, fixed=fixed, image_size=(width, height), no_images="")


class Trace(Protocol):
    """Runs a pipeline hollow; see `ddpo.tracing.trace`."""

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Image] | None, *, num_steps: int | None = None
    ) -> list[Step]:
        """The steps of a run on these prompts and input images, at most `num_steps` of them."""
        ...


def probe(
    pipeline: DiffusionPipeline, run: Trace, image_size: tuple[int, int] | None = None
) -> tuple[list[Step], Step, Step]:
    """What a pipeline does with a few prompts: all steps of two, and the first step of one and of three.

    Args:
        pipeline: The stock pipeline.
        run: Runs it hollow.
        image_size: (width, height) of the input images; None for none.

    Raises:
        UntraceableError: It cannot be called this way, or not as a chain of equal steps.
    """
    name = type(pipeline).__name__

    def tried(count: int, num_steps: int | None = None) -> list[Step]:
        images = probe_images(count, image_size) if image_size else None
        return run(PROBE_PROMPTS[:count], images, num_steps=num_steps)

    try:
        (one,) = tried(1, num_steps=1)
        (three,) = tried(3, num_steps=1)
        steps = tried(2)  # last: the scheduler keeps the timesteps of this run
    except UntraceableError:
        raise
    except Exception as error:  # whatever the pipeline's own code raises, it cannot be called like this
        given = "prompts, an image for each, and noise" if image_size else "prompts and noise alone"
        raise UntraceableError(
            f"{name} fails when it is called from {given}: {type(error).__name__}: {error}"
        ) from error
    if one.calls[0].latents.shape[1:] != three.calls[0].latents.shape[1:]:
        raise UntraceableError(
            f"{name} hands its denoiser more for three prompts than for one: it takes the images of a batch together, "
            "not one for each prompt"
        )
    if len({tuple(call.latents.shape for call in step.calls) for step in steps}) > 1:
        raise UntraceableError(f"{name} calls its denoiser differently at different steps; one rule must fit all")
    if any(not torch.equal(beside_noise(step), beside_noise(steps[0])) for step in steps):
        raise UntraceableError(f"{name} changes what stands beside the noise from step to step; it must stay the same")
    changing = next((argument for step in steps for argument in _differing(steps[0], step)), None)
    if changing is not None:
        raise UntraceableError(f"{name} changes {changing} of its denoiser from step to step; it must stay the same")
    if any(not torch.equal(step.model_output, steps[0].model_output) for step in steps):
        raise UntraceableError(
            f"{name} guides differently at different steps: of the same denoiser outputs it makes others; one rule "
            "must fit all"
        )
    scheduled = len(pipeline.scheduler.timesteps)
    if len(steps) != scheduled:
        raise UntraceableError(f"{name} makes {len(steps)} steps where its scheduler has {scheduled}")
    return steps, one, three


def _differing(step: Step, other: Step) -> Iterator[str]:
    """Names of the arguments that the denoiser's calls at two steps do not share."""
    for call, later in zip(step.calls, other.calls, strict=True):
        for name in {**call.arguments, **later.arguments}:
            if not same(call.arguments.get(name), later.arguments.get(name)):
                yield name


def _guidance(parameters: Mapping[str, inspect.Parameter], denoiser: ModelMixin) -> str | None:
    scale = parameters.get("guidance_scale")
    optional = scale is None or scale.default is None
    if "true_cfg_scale" in parameters and optional and not denoiser.config.get("guidance_embeds", False):
        return "true_cfg_scale"
    return None if scale is None else "guidance_scale"
