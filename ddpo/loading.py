"""Finds and loads a pretrained pipeline, with errors that say what is missing."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ddpo.quantization import Quantization, quantization_config
from ddpo.schedule import flow_matching_scheduler

SHAPES = Path(__file__).parent / "assets" / "shapes"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a pipeline was loaded from; as `load_pipeline` takes it.

    Attributes:
        path: A folder, a Hugging Face hub id, or `shapes`.
        revision: Of the hub repository.
        variant: Of the weight files.
        quantization: Of the denoiser's linear layers.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    quantization: Quantization | None = None


def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    quantization: Quantization | None = None,
) -> DiffusionPipeline:
    """`DiffusionPipeline.from_pretrained` with two changes.

    The safety checker is left out, which would blacken images before they are scored, and a flow-matching model's
    solver becomes the scheduler of the same noise schedule (`ddpo.schedule.flow_matching_scheduler`).

    Args:
        path: A folder, a Hugging Face hub id, or `shapes`.
        dtype: Of the weights.
        revision: Of the hub repository.
        variant: Of the weight files, such as `fp16`.
        quantization: Of the denoiser's linear layers; None for none.

    Raises:
        FileNotFoundError: Neither a pipeline folder nor a hub model that can be reached.
    """
    folder = SHAPES if str(path) == "shapes" else Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"model.path {str(folder)!r} is a folder without model_index.json; "
                "give a folder written by a diffusers pipeline's save_pretrained"
            )
    elif folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise FileNotFoundError(
            f"model.path {str(path)!r} is neither a folder nor a hub id owner/name; 'shapes' ships with ddpo"
        )
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
    except (OSError, ValueError, AttributeError) as error:
        raise FileNotFoundError(f"model.path {source!r} could not be loaded: {_first_line(error)}") from error
    if pipeline.components.get("safety_checker") is not None:
        pipeline.register_modules(safety_checker=None)
        pipeline.register_to_config(requires_safety_checker=False)
    if pipeline.components.get("scheduler") is not None:
        pipeline.scheduler = flow_matching_scheduler(pipeline.scheduler)
    return pipeline


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
