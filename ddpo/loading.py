"""Finds and loads a pretrained pipeline, with errors that say what is missing."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ddpo.pipeline.quantization import Quantization, quantization_config
from ddpo.pipeline.scheduler import flow_matching_scheduler
from ddpo.pipeline.single_file import load_single_file
from ddpo.pipeline.unloadable import check_single_file, check_weights, reason
from ddpo.validation import FieldError

SHAPES = Path(__file__).parent / "assets" / "shapes"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a pipeline was loaded from; as `load_pipeline` takes it.

    Attributes:
        path: A folder, a single file, a Hugging Face hub id, or `shapes`.
        revision: Of the hub repository.
        variant: Of the weight files.
        config: Of a single file: folder or hub id of a pipeline of the same kind.
        quantization: Of the denoiser's linear layers.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    quantization: Quantization | None = None


def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    quantization: Quantization | None = None,
) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained`, or `from_single_file`, with two changes.

    The safety checker is left out where the pipeline can do without, since it would blacken images before they are
    scored, and a flow-matching model's solver becomes the scheduler of the same noise schedule
    (`ddpo.pipeline.scheduler.flow_matching_scheduler`).

    Args:
        path: A folder, a single `.safetensors` file, a Hugging Face hub id, or `shapes`.
        dtype: Of the weights.
        revision: Of the hub repository.
        variant: Of the weight files, such as `fp16`.
        config: Of a single file: folder or hub id of a pipeline of the same kind; None for the one that diffusers
            takes (`ddpo.pipeline.single_file`).
        quantization: Of the denoiser's linear layers; None for none.

    Raises:
        FieldError: Neither a pipeline folder, a file nor a hub model that can be reached.
    """
    folder = SHAPES if str(path) == "shapes" else Path(path).expanduser()
    check_single_file(folder, config=config, revision=revision, variant=variant, quantization=quantization)
    if folder.is_file():
        return _prepared(load_single_file(folder, config=config, dtype=dtype))
    if folder.exists():
        check_weights(folder, variant=variant)
        if not (folder / "model_index.json").is_file():
            written = "a folder that a diffusers pipeline's save_pretrained has written, with model_index.json"
            raise FieldError("path", str(folder), written)
    elif folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise FieldError("path", str(path), "a folder, a hub id owner/name, or shapes, which ships with ddpo")
    source = str(folder) if folder.is_dir() else str(path)
    quantizer = None if quantization is None else quantization_config(quantization, dtype=dtype)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            source,
            dtype=dtype,
            revision=revision,
            variant=variant,
            local_files_only=folder.is_dir(),
            quantization_config=quantizer,
        )
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        why = reason(error, source, revision=revision)
        raise FieldError("path", source, f"a pipeline that can be loaded ({why})") from error
    return _prepared(pipeline)


def _prepared(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline without its safety checker where it can do without, and with a scheduler that the policy reads."""
    if pipeline.components.get("safety_checker") is not None and "requires_safety_checker" in pipeline.config:
        pipeline.register_modules(safety_checker=None)
        pipeline.register_to_config(requires_safety_checker=False)
    if pipeline.components.get("scheduler") is not None:
        pipeline.scheduler = flow_matching_scheduler(pipeline.scheduler)
    return pipeline
