"""Trained weights in diffusers' own format, written and read back."""

import copy
import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpo.file_modes import open_by_umask
from ddpo.pipeline.experts import parts_of
from ddpo.pipeline.tracing import find_network
from ddpo.validation import UserError
from ddpo.weights.adapter import ADAPTER, AdapterConfig, LoraConfig

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers import DiffusionPipeline, ModelMixin

PEFT_PREFIX, PEFT_FILE = "base_model.model", "adapter_model.safetensors"


def lora_state(denoiser: nn.Module, config: LoraConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights in peft's naming with the scale alpha / rank baked into B.

    Most tools read a LoRA without its metadata as alpha = rank; with the scale in the weights that is right.

    Args:
        denoiser: The network with its adapter.
        config: The adapter's.
        weights: The adapter's weights by the parameters' names.
    """
    import peft

    state = peft.get_peft_model_state_dict(denoiser, state_dict=dict(weights), adapter_name=ADAPTER)
    return {
        name: (value * config.scale if ".lora_B." in name else value).detach().cpu().contiguous()
        for name, value in state.items()
    }


def loads_lora(pipeline: "DiffusionPipeline", name: str) -> bool:
    """Whether a pipeline writes and reads a LoRA of its component `name` itself: some inherit that without being able.

    Args:
        pipeline: The stock pipeline.
        name: The denoiser's component name.
    """
    save = getattr(type(pipeline), "save_lora_weights", None)
    takes = save is not None and f"{name}_lora_layers" in inspect.signature(save).parameters
    return takes and hasattr(pipeline.components[name], "load_lora_adapter")


def save_weights(
    pipeline: "DiffusionPipeline",
    name: str,
    denoiser: "ModelMixin",
    folder: Path,
    weights: Mapping[str, Tensor],
    *,
    adapter: AdapterConfig,
) -> None:
    """Writes what was trained in diffusers' own format.

    A LoRA goes to `folder` itself, for `pipeline.load_lora_weights(folder)`, or, for a pipeline that cannot read one
    for this network (PixArt, DDPM), for `peft.PeftModel.from_pretrained(pipeline.<name>, folder)`. Weights trained as
    a whole go to `folder/<name>`, for `from_pretrained(folder, subfolder=name)`. Of two networks the second one's LoRA
    goes to `folder/transformer_2`, for `load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`.

    Args:
        pipeline: The pipeline that the denoiser belongs to.
        name: Its component name, `unet` or `transformer`.
        denoiser: The trained network; its own weights may be split over processes, and are not read.
        folder: Where to write; made if missing.
        weights: The trained weights by the parameters' names, whole.
        adapter: What is trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapter, LoraConfig):
        for part, state in by_part(denoiser, lora_state(denoiser, adapter, weights)).items():
            place = folder if part in ("", name) else folder / part
            if loads_lora(pipeline, name):
                pipeline.save_lora_weights(str(place), **{f"{name}_lora_layers": state}, safe_serialization=True)
            else:
                save_as_peft(denoiser, place, state)
    else:
        for part, values in by_part(denoiser, weights).items():
            own = part or name
            _save_whole(pipeline, own, parts_of(denoiser)[part], folder / own, values)
    open_by_umask(folder)


def by_part(denoiser: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights of each of several networks, by the names in it; of a single one all."""
    if "" in parts_of(denoiser):
        return {"": dict(weights)}
    split: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        split.setdefault(part, {})[rest] = value
    return split


def read_weights(
    pipeline: "DiffusionPipeline", name: str, folder: Path, parameters: Collection[str], *, adapter: AdapterConfig
) -> dict[str, Tensor]:
    """What `save_weights` wrote, by the parameters' names, on the CPU.

    Args:
        pipeline: As for `save_weights`.
        name: As for `save_weights`.
        folder: Where it was written.
        parameters: Names of the trained weights.
        adapter: As for `save_weights`.

    Raises:
        UserError: The folder holds other weights.
    """
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

    read: dict[str, Tensor] = {}
    for part, names in by_part(find_network(pipeline), {key: torch.empty(0) for key in parameters}).items():
        scale = 1.0
        if not isinstance(adapter, LoraConfig):
            file, keys = folder / (part or name) / SAFETENSORS_WEIGHTS_NAME, {key: key for key in names}
        else:
            is_peft = not loads_lora(pipeline, name)
            prefix = PEFT_PREFIX if is_peft else name
            place = folder if part in ("", name) else folder / part
            file = place / (PEFT_FILE if is_peft else "pytorch_lora_weights.safetensors")
            keys = {key: f"{prefix}.{key.replace(f'.{ADAPTER}.', '.')}" for key in names}
            scale = adapter.scale
        saved = load_file(file)
        missing = [key for key in keys.values() if key not in saved]
        if missing:
            raise UserError(f"{file} holds other weights than this policy trains: {missing[0]} is missing")
        start = f"{part}." if part else ""
        for key, stored in keys.items():
            read[start + key] = saved[stored] / (scale if ".lora_B." in key else 1.0)
    return read


def _save_whole(
    pipeline: "DiffusionPipeline", name: str, denoiser: "ModelMixin", folder: Path, weights: Mapping[str, Tensor]
) -> None:
    """Configuration and weights as `save_pretrained` writes them, in one file, under the class that was loaded."""
    from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

    folder.mkdir(parents=True, exist_ok=True)
    _, class_name = pipeline.config[name]  # splitting a network over processes derives a class from its own
    settings = {**json.loads(denoiser.to_json_string()), "_class_name": class_name}
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    parameters = {key for key, _ in denoiser.named_parameters()}
    buffers = {key: value for key, value in denoiser.state_dict().items() if key not in parameters}
    state = {key: value.detach().cpu().contiguous() for key, value in {**buffers, **weights}.items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def save_as_peft(denoiser: "ModelMixin", folder: Path, lora: Mapping[str, Tensor]) -> None:
    """Writes a LoRA for `peft.PeftModel.from_pretrained`.

    Args:
        denoiser: The network with its adapter.
        folder: Where to.
        lora: From `lora_state`.
    """
    settings = copy.copy(vars(denoiser)["peft_config"][ADAPTER])
    settings.lora_alpha = settings.r  # the scale is in the weights
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    save_file({f"{PEFT_PREFIX}.{name}": value for name, value in lora.items()}, folder / PEFT_FILE)
