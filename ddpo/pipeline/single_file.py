"""A pipeline from one file of weights, by diffusers' `from_single_file`.

A file holds weights alone. What pipeline they belong to, its settings and tokenizers, and networks that the file lacks
come from a diffusers pipeline of the same kind: the one that is named, else the hub's that diffusers knows such weights
by.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError, fetch_diffusers_config
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpo.pipeline.unloadable import reason
from ddpo.validation import FieldError


def load_single_file(file: Path, *, config: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline whose weights a file holds.

    Args:
        file: Of the weights, `.safetensors`.
        config: Folder or hub id of a pipeline of the same kind; None for the one that diffusers takes.
        dtype: Of the weights.

    Raises:
        FieldError: It cannot be loaded, or there is no pipeline of the same kind at hand.
    """
    kind = config or _recognised(file)
    is_local = Path(kind).expanduser().is_dir()
    kind = str(Path(kind).expanduser()) if is_local else kind
    try:
        index = DiffusionPipeline.load_config(kind, local_files_only=is_local)
    except (OSError, ValueError) as error:
        like = f"a folder of a pipeline of the same kind, with its configuration files and tokenizers; of {kind!r}"
        raise FieldError("config", config, f"{like}: {reason(error, kind, revision=None)}") from error
    pipeline_class: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(pipeline_class, "from_single_file"):
        raise FieldError("config", kind, f"of a pipeline that has from_single_file, not {index.get('_class_name')}")
    try:
        return pipeline_class.from_single_file(str(file), config=kind, dtype=dtype, local_files_only=is_local)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        why = f"as {pipeline_class.__name__} with the settings of {kind}: {' '.join(str(error).split())}"
        raise FieldError("path", str(file), f"a file that can be loaded ({why})") from error


def _recognised(file: Path) -> str:
    """The hub id of the pipeline that diffusers takes for the weights in a file."""
    try:
        return fetch_diffusers_config(load_file(file))["pretrained_model_name_or_path"]
    except (OSError, SafetensorError) as error:
        raise FieldError("path", str(file), f"a file of weights ({error})") from error
