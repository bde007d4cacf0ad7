"""Builds a tiny random pipeline of a class, from the annotations of its constructor.

Every parameter of the constructor is looked at: a text encoder brings its tokenizer along, a VAE and a denoiser come
from their own default configurations, shrunken (`tests.pipelines.networks`), a scheduler is one of two. What no
annotation says is a `Row`'s.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin

from tests.pipelines.encoders import ENCODERS, HIDDEN
from tests.pipelines.networks import VAES, build, shaken

DENOISER_NAMES = ("unet", "transformer", "transformer_2")
VAE_NAMES = ("vae", "movq")
VP = {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}
CONTROL_HEADS = {"attention_head_dim": HIDDEN // 2, "num_attention_heads": 2}
FLOW_BY_FAMILY = ("Sana", "SkyReels", "Wan", "Motif", "Bria", "Cosmos")  # annotated with a VP solver in its flow mode


@dataclass(frozen=True, kw_only=True)
class Row:
    """A pipeline class to be built and tried.

    Attributes:
        pipeline: Its class in diffusers.
        group: What it is for: `image`, `video`, `edit`, `image to video`, `nothing` for one without prompts.
        size: Side of the pictures in pixels; None for the pipeline's own.
        frames: Of a video.
        guided: Guidance scale of the guided run; None for no such run.
        unguided: Of the run without guidance; None for no such run.
        denoiser: More of the denoiser's configuration.
        vae: More of the VAE's configuration.
        parts: Further arguments of the constructor.
        classes: Classes of text encoders and VAEs that annotations leave open, by parameter.
        scheduler: Class of the scheduler where it is another.
        scheduler_options: Of the scheduler.
        attributes: Numbers that constructors leave on the pipeline, or on a part of it (`vae.kernel`), where they are
            large.
        second: Whether `transformer_2` is given.
        name: For the table; the class without `Pipeline` if empty.
    """

    pipeline: str
    group: str = "image"
    size: int | None = 16
    frames: int | None = None
    guided: float | None = 4.0
    unguided: float | None = 1.0
    denoiser: Mapping[str, object] = field(default_factory=dict)
    vae: Mapping[str, object] = field(default_factory=dict)
    parts: Mapping[str, object] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    scheduler: str = ""
    scheduler_options: Mapping[str, object] = field(default_factory=dict)
    attributes: Mapping[str, object] = field(default_factory=dict)
    second: bool = False
    name: str = ""

    @property
    def title(self) -> str:
        """How the table calls it."""
        return self.name or self.pipeline.removesuffix("Pipeline")


def build_pipeline(row: Row, *, seed: int = 0) -> DiffusionPipeline:
    """The pipeline of a row, with random weights of this seed.

    Raises:
        Exception: Whatever the classes raise: it cannot be built by rule.
    """
    torch.manual_seed(seed)
    known = getattr(diffusers, row.pipeline)
    parameters = {name: p for name, p in inspect.signature(known.__init__).parameters.items() if name != "self"}
    parts: dict[str, object] = {}
    for name, parameter in parameters.items():
        optional = parameter.default is not inspect.Parameter.empty
        if name in row.parts:
            parts[name] = row.parts[name]
        elif name.startswith("text_encoder") and "select" not in name:
            classes = _classes(row, parameter)
            kind = next((kind for kind in classes if kind in ENCODERS), None)
            if kind is None:
                raise LookupError(f"no tiny text encoder for {' | '.join(classes)}")
            tokenizer, parts[name] = ENCODERS[kind](kind)
            suffix = name.removeprefix("text_encoder")
            for taker in (f"tokenizer{suffix}", "processor", "text_processor"):
                if taker in parameters:
                    parts.setdefault(taker, tokenizer)
        elif name in DENOISER_NAMES and (row.second or name != "transformer_2"):
            kind = next(kind for kind in _names(parameter) if hasattr(diffusers, kind))
            parts[name] = build(kind, dict(row.denoiser))
        elif name in VAE_NAMES:
            classes = _classes(row, parameter)
            kind = next((kind for kind in classes if kind in VAES), None)
            if kind is None:
                raise LookupError(f"no shrunken {' | '.join(classes)}")
            parts[name] = build(kind, dict(row.vae), is_vae=True)
        elif name == "controlnet":
            parts[name] = _controlnet(parts, _names(parameter))
        elif name == "adapter":
            parts[name] = diffusers.T2IAdapter(channels=list(parts["unet"].config.block_out_channels), num_res_blocks=1,
                                               downscale_factor=8, adapter_type="full_adapter")  # fmt: skip
        elif name == "guider" and not optional:
            parts[name] = diffusers.ClassifierFreeGuidance()
        elif name == "scheduler":
            parts[name] = _scheduler(row, _names(parameter))
        elif name == "requires_safety_checker" or name == "add_watermarker":
            parts[name] = False
        elif name.startswith("tokenizer") or name in ("processor", "text_processor"):
            continue
        elif not optional:
            parts[name] = None
    missing = [name for name, p in parameters.items() if name not in parts and p.default is inspect.Parameter.empty]
    pipeline: DiffusionPipeline = known(**parts, **dict.fromkeys(missing))
    for place, value in row.attributes.items():
        part, _, name = place.rpartition(".")
        setattr(getattr(pipeline, part) if part else pipeline, name, value)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _controlnet(parts: Mapping[str, object], names: list[str]) -> ModelMixin:
    """One beside the denoiser, whose weights it starts from; its own ones are not zero, as they are at first."""
    kind = next(name for name in names if hasattr(diffusers, name) and "Multi" not in name)
    known = getattr(diffusers, kind)
    if hasattr(known, "from_unet"):
        made = known.from_unet(parts["unet"])
    else:
        made = known.from_transformer(parts["transformer"], num_layers=1, **CONTROL_HEADS)
    return shaken(made).eval()


def _classes(row: Row, parameter: inspect.Parameter) -> list[str]:
    """Classes that a part may have: the row's, else the annotation's."""
    return [row.classes[parameter.name]] if parameter.name in row.classes else _names(parameter)


def _names(parameter: inspect.Parameter) -> list[str]:
    """Classes that an annotation names."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return [
        name for name in re.findall(r"\w+", text) if name[0].isupper() and name not in ("None", "Optional", "Union")
    ]


def _scheduler(row: Row, names: list[str]) -> SchedulerMixin:
    if row.scheduler:
        return getattr(diffusers, row.scheduler)(**row.scheduler_options)
    if any("FlowMatch" in name for name in names) or row.pipeline.startswith(FLOW_BY_FAMILY):
        return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **row.scheduler_options})
    named = next((name for name in names if name not in ("SchedulerMixin", "KarrasDiffusionSchedulers")
                  and hasattr(diffusers, name)), None)  # fmt: skip
    if named is None or named in ("DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"):
        return DDIMScheduler(**{**VP, **row.scheduler_options})
    return getattr(diffusers, named)(**row.scheduler_options)
