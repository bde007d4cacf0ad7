"""What a stock pipeline's `__call__` is given: prompts or a batch size, guidance, sizes.

Pipelines differ in the names of the same few things; they are read from the signature once, when the policy is made.

    prompts    `prompt`; `batch_size` for an unconditional pipeline, whose prompts are counted and otherwise ignored
    guidance   `guidance_scale`; `true_cfg_scale` with negative prompts where `guidance_scale` is only the input of
               guidance-distilled weights and is left out by default (Qwen-Image)
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from ddpo.samplers import SamplerConfig
from ddpo.tracing import Step, UntraceableError

FOREIGN_INPUTS = ("mask_image", "control_image", "init_image")
BLANK = " "  # the unconditional prompt of Qwen-Image's authors; an empty one would have no token at all

# Of unequal lengths, the last the longest, to see what depends on them; short: some text encoders take few tokens.
PROBE_PROMPTS = ("a", "a b", "a b c")


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """How to call one pipeline.

    Attributes:
        prompts: The parameter that says how many images: `prompt` or `batch_size`.
        guidance: The parameter of the guidance scale; None for a pipeline without.
        num_steps: Denoising steps.
        guidance_scale: Guidance as the pipeline defines it.
        fixed: Arguments that are always the same, such as height and width.
        takes_latents: Whether initial latents can be given.
    """

    prompts: str
    guidance: str | None
    num_steps: int
    guidance_scale: float
    fixed: Mapping[str, object]
    takes_latents: bool

    def arguments(
        self,
        prompts: Sequence[str],
        *,
        output_type: str,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> dict[str, object]:
        """Keyword arguments of `pipeline.__call__`.

        Args:
            prompts: B texts.
            output_type: `latent` for final latents, `pt` for images in [0, 1].
            generator: Of the initial latents.
            latents: Initial latents instead, where `takes_latents`.
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
        if self.guidance is not None:
            given[self.guidance] = scale
        if self.guidance == "true_cfg_scale" and scale > 1:
            given["negative_prompt"] = [BLANK] * len(prompts)
        if generator is not None:
            given["generator"] = generator
        if latents is not None:
            given["latents"] = latents
        return given


def read_call(pipeline: DiffusionPipeline, denoiser: ModelMixin, sampler: SamplerConfig) -> PipelineCall:
    """Reads how a pipeline is called from its signature.

    Raises:
        UntraceableError: It takes neither prompts nor a batch size, or needs an image besides.
        ValueError: The sampler sets something that the pipeline does not take.
    """
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    prompts = next((option for option in ("prompt", "batch_size") if option in parameters), None)
    if prompts is None:
        raise UntraceableError(f"{name} takes neither prompt nor batch_size; a policy needs one to say how many images")
    foreign = [option for option in FOREIGN_INPUTS if option in parameters]
    if foreign:
        raise UntraceableError(f"{name} needs {', '.join(foreign)} besides a prompt; a policy starts from noise alone")
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
    return PipelineCall(
        prompts=prompts,
        guidance=_guidance(parameters, denoiser),
        num_steps=sampler.num_steps,
        guidance_scale=sampler.guidance_scale,
        fixed=fixed,
        takes_latents="latents" in parameters,
    )


class Trace(Protocol):
    """Runs a pipeline hollow; see `ddpo.tracing.trace`."""

    def __call__(self, prompts: Sequence[str], *, num_steps: int | None = None) -> list[Step]:
        """The steps of a run on these prompts, at most `num_steps` of them."""
        ...


def probe(pipeline: DiffusionPipeline, run: Trace) -> tuple[list[Step], Step, Step]:
    """What a pipeline does with a few prompts: all steps of two, and the first step of one and of three.

    Raises:
        UntraceableError: It cannot be called this way, or not as a chain of equal steps.
    """
    name = type(pipeline).__name__
    try:
        (one,) = run(PROBE_PROMPTS[:1], num_steps=1)
        (three,) = run(PROBE_PROMPTS, num_steps=1)
        steps = run(PROBE_PROMPTS[:2])  # last: the scheduler keeps the timesteps of this run
    except UntraceableError:
        raise
    except Exception as error:  # whatever the pipeline's own code raises, it cannot be called like this
        raise UntraceableError(
            f"{name} fails when it is called from prompts and noise alone: {type(error).__name__}: {error}"
        ) from error
    if len({tuple(call.latents.shape for call in step.calls) for step in steps}) > 1:
        raise UntraceableError(f"{name} calls its denoiser differently at different steps; one rule must fit all")
    scheduled = len(pipeline.scheduler.timesteps)
    if len(steps) != scheduled:
        raise UntraceableError(f"{name} makes {len(steps)} steps where its scheduler has {scheduled}")
    return steps, one, three


def _guidance(parameters: Mapping[str, inspect.Parameter], denoiser: ModelMixin) -> str | None:
    scale = parameters.get("guidance_scale")
    optional = scale is None or scale.default is None
    if "true_cfg_scale" in parameters and optional and not denoiser.config.get("guidance_embeds", False):
        return "true_cfg_scale"
    return None if scale is None else "guidance_scale"
