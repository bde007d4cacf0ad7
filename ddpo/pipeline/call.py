"""What a stock pipeline's `__call__` is given: prompts or a batch size, guidance, sizes.

Pipelines differ in the names of the same few things; they are read from the signature once, when the policy is made.

    prompts    `prompt`; `batch_size` for an unconditional pipeline, whose prompts are counted and otherwise ignored
    guidance   `guidance_scale`; `true_cfg_scale` with negative prompts where `guidance_scale` is only the input of
               guidance-distilled weights and is left out by default (Qwen-Image); the `guider`, a component, where the
               call has no scale (HunyuanVideo 1.5)
    images     `image`, `control_image`, `mask_image`, one a prompt, of a pipeline that edits or follows a picture
               (FLUX Kontext, FLUX Control, FLUX Fill)
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, ModelMixin, UNet2DConditionModel

from ddpo.pipeline.foreign_inputs import check_inputs
from ddpo.pipeline.input_images import DEFAULT_SIDE, INPUT_NAMES, MASK, Inputs
from ddpo.pipeline.tracing import UntraceableError, replaced
from ddpo.sampling.samplers import SamplerConfig
from ddpo.validation import FieldError

BLANK = " "  # the unconditional prompt of Qwen-Image's authors; an empty one would have no token at all
GUIDER = "guider"
SYNONYMS = {"num_frames": ("num_frames", "frames", "video_length")}  # Sana Video's and Latte's last
SIDES = ("height", "width")
Batch = Literal["any", "one", "scalar"]


@dataclass(frozen=True, kw_only=True)
class PipelineCall:
    """How to call one pipeline.

    Attributes:
        prompts: The parameter that says how many images: `prompt` or `batch_size`.
        guidance: The parameter of the guidance scale, or `guider` where that component has it; None for a pipeline
            without.
        num_steps: Denoising steps.
        guidance_scale: Guidance as the pipeline defines it.
        fixed: Arguments that are always the same, such as height and width.
        inputs: Names of the input images that belong to every prompt; empty for a pipeline from prompts alone.
        image_size: Their (width, height) in pixels; None without.
        no_images: Why there are no input images, for messages; empty with them.
        batch: Whether it takes any number of prompts, a list of one, or one that is in no list; images alike.
        negative: Whether it needs a negative prompt to guide.
    """

    prompts: str
    guidance: str | None
    num_steps: int
    guidance_scale: float
    fixed: Mapping[str, object]
    inputs: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    no_images: str = ""
    batch: Batch = "any"
    negative: bool = False

    @property
    def alone(self) -> bool:
        """Whether it takes one prompt at a time."""
        return self.batch != "any"

    def arguments(
        self,
        prompts: Sequence[str],
        *,
        output_type: str,
        images: Sequence[Inputs] | None = None,
        generator: torch.Generator | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> dict[str, object]:
        """Keyword arguments of `pipeline.__call__`.

        Args:
            prompts: B texts.
            output_type: `latent` for final latents, `pt` for images in [0, 1].
            images: The `inputs` of B prompts, of `image_size`; with an `image_size` only, and needed there.
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
        assert (images is None) == (self.image_size is None), "one image a prompt, or none"
        assert not self.alone or len(prompts) == 1, "one prompt at a time"
        each: dict[str, list[object]] = {"prompt": list(prompts)} if self.prompts == "prompt" else {}
        for name in self.inputs:
            each[name] = [one[name] for one in images or ()]
        if scale > 1 and (self.negative or self.guidance == "true_cfg_scale"):
            each["negative_prompt"] = [BLANK] * len(prompts)
        given.update({name: values[0] if self.batch == "scalar" else values for name, values in each.items()})
        if self.prompts == "batch_size":
            given["batch_size"] = len(prompts)
        if self.guidance not in (None, GUIDER):
            given[self.guidance] = scale
        if generator is not None:
            given["generator"] = generator
        return given

    @contextmanager
    def guiding(self, pipeline: DiffusionPipeline, scale: float | None = None) -> Iterator[None]:
        """The pipeline's guider, if it has one, has this guidance scale (default as configured), for a `with` block."""
        if self.guidance != GUIDER:
            yield
            return
        guider = pipeline.guider.new(guidance_scale=self.guidance_scale if scale is None else scale)
        with replaced(pipeline, GUIDER, guider):
            yield


def read_call(
    pipeline: DiffusionPipeline, denoiser: ModelMixin, sampler: SamplerConfig, *, no_images: str = ""
) -> PipelineCall:
    """Reads how a pipeline is called from its signature.

    Args:
        pipeline: The stock pipeline.
        denoiser: Its denoiser.
        sampler: Steps, guidance and sizes.
        no_images: Why a pipeline that takes images is to be called without; empty to give it one a prompt.

    Raises:
        UntraceableError: It takes neither prompts nor a batch size, or starts from a noised image.
        UserError: The sampler sets something that the pipeline does not take.
    """
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    check_inputs(pipeline, denoiser, parameters)
    prompts = next((option for option in ("prompt", "batch_size") if option in parameters), None)
    if prompts is None:
        raise UntraceableError(f"{name} takes neither prompt nor batch_size; a policy needs one to say how many images")
    options = {
        "height": sampler.height, "width": sampler.width, "num_frames": sampler.num_frames,
        "guidance_rescale": sampler.guidance_rescale or None,
    }  # fmt: skip
    inputs = () if no_images else tuple(name for name in INPUT_NAMES if name in parameters)
    fixed: dict[str, object] = {}
    for option, value in options.items():
        own = next((known for known in SYNONYMS.get(option, (option,)) if known in parameters), None)
        if value is None or (own is None and option in SIDES and inputs):
            continue  # where there is no such option, a picture has its input image's size
        if own is None:
            raise FieldError(f"sampler.{option}", value, f"left out with {name}, which takes no {option}")
        fixed[own] = value
    if "use_resolution_binning" in parameters and {"height", "width"} <= set(fixed):
        fixed["use_resolution_binning"] = False  # else a size that was asked for becomes the nearest of a table
    if MASK in inputs and "strength" in parameters:
        fixed["strength"] = 1.0  # from noise alone
    call = PipelineCall(
        prompts=prompts,
        guidance=_guidance(pipeline, parameters, denoiser),
        num_steps=sampler.num_steps,
        guidance_scale=sampler.guidance_scale,
        fixed=fixed,
        inputs=inputs,
        no_images=no_images or f"{name} takes no image",
    )
    side = _own_side(pipeline, denoiser)
    size = (sampler.width or side, sampler.height or side)
    return _with_images(call, parameters, size) if inputs else call


def _own_side(pipeline: DiffusionPipeline, denoiser: ModelMixin) -> int:
    """Pixels of a square picture where the sampler does not say: what a UNet is made for."""
    side = denoiser.config.get("sample_size")
    is_unet = isinstance(denoiser, UNet2DConditionModel) and isinstance(side, int)
    return side * pipeline.vae_scale_factor if is_unet and hasattr(pipeline, "vae_scale_factor") else DEFAULT_SIDE


def _with_images(
    call: PipelineCall, parameters: Mapping[str, inspect.Parameter], image_size: tuple[int, int]
) -> PipelineCall:
    """The call with input images of the size of the pictures for every prompt."""
    width, height = image_size
    size = {"height": height, "width": width}
    fixed = {**call.fixed, **{side: pixels for side, pixels in size.items() if side in parameters}}
    if "max_area" in parameters:
        fixed["max_area"] = width * height  # else a size that was asked for becomes another of a megapixel
    if "_auto_resize" in parameters and image_size != (DEFAULT_SIDE, DEFAULT_SIDE):
        fixed["_auto_resize"] = False  # the same for the input image
    return replace(call, fixed=fixed, image_size=image_size, no_images="")


def _guidance(
    pipeline: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter], denoiser: ModelMixin
) -> str | None:
    scale = parameters.get("guidance_scale")
    optional = scale is None or scale.default is None
    if "true_cfg_scale" in parameters and optional and not denoiser.config.get("guidance_embeds", False):
        return "true_cfg_scale"
    if scale is None and isinstance(pipeline.components.get(GUIDER), ClassifierFreeGuidance):
        return GUIDER
    return None if scale is None else "guidance_scale"
