"""What a pipeline needs besides prompts, input images and noise, told by its parts before anything is run."""

import inspect
from collections.abc import Mapping

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ddpo.pipeline.input_images import IMAGE, INPUT_NAMES, MASK
from ddpo.pipeline.tracing import UntraceableError

FOREIGN_INPUTS = ("init_image", "control_mask")
CONTROL_PARTS = ("controlnet", "adapter")  # networks that read a picture of their own
INPUT_WORDS = ("video", "image", "mask", "frames", "control", "pose", "audio", "reference", "trajectory", "camera")
OPTION_WORDS = (
    "embeds",
    "latents",
    "scale",
    "num",
    "guidance",
    "output",
    "size",
    "fps",
    "callback",
    "max",
    "type",
    "attention",
)


def check_inputs(
    pipeline: DiffusionPipeline, denoiser: ModelMixin, parameters: Mapping[str, inspect.Parameter]
) -> None:
    """Refuses a pipeline that cannot do with prompts, an image for each, and noise.

    Args:
        pipeline: The stock pipeline.
        denoiser: Its denoiser.
        parameters: Of its `__call__`.

    Raises:
        UntraceableError: What it needs, and what to do about it.
    """
    name = type(pipeline).__name__
    foreign = [option for option in FOREIGN_INPUTS if option in parameters]
    if foreign:
        raise UntraceableError(f"{name} needs {', '.join(foreign)} besides a prompt; a policy starts from noise alone")
    control = [part for part in CONTROL_PARTS if isinstance(pipeline.components.get(part), nn.Module)]
    if control:
        raise UntraceableError(
            f"{name} is steered by a picture for its {control[0]} besides a prompt; take the model's pipeline without"
        )
    if IMAGE in parameters and MASK not in parameters and "strength" in parameters:
        raise UntraceableError(f"{name} starts from an image with noise on it (strength); a policy starts from noise")
    if IMAGE in parameters and "prompt" not in parameters:
        raise UntraceableError(f"{name} makes its pictures of an image without a prompt; a policy starts from prompts")
    if "pag_scale" in parameters:
        raise UntraceableError(
            f"{name} guides by perturbed attention (PAG), which a policy does not know; load the weights by the "
            "pipeline class without PAG in its name"
        )
    if getattr(denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise UntraceableError(
            f"the denoiser of {name} has an IP-Adapter, which needs an image of its own; take it out by "
            "pipeline.unload_ip_adapter()"
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise UntraceableError(
            f"the denoiser of {name} reuses outputs of earlier steps (a cache), which gives no likelihood; switch it "
            "off by its disable_cache()"
        )


def more_inputs(pipeline: DiffusionPipeline) -> str:
    """Names of further inputs that a pipeline takes, as an addition to why a call without them failed; or nothing."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.default is None
        and name not in (*INPUT_NAMES, "image_embeds")
        and any(word in name for word in INPUT_WORDS)
        and not any(word in name for word in OPTION_WORDS)
    ]
    return f" (it also takes {', '.join(names)})" if names else ""
