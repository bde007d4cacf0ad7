"""A LoRA to begin from: read by the pipeline's own loader, then trained on, or put under what is trained.

    reference: base     the trained adapter begins at its values; the KL is to the pretrained model
    reference: start    it is added to the frozen weights; a new adapter is trained on top, the KL is to both together

Whatever diffusers reads can be read, kohya's files too, with alpha as diffusers understands it.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from ddpo.pipeline.experts import Experts
from ddpo.pipeline.quantization import is_quantized
from ddpo.pipeline.tracing import find_denoiser, find_network
from ddpo.validation import FieldError
from ddpo.weights.adapter import ADAPTER, AdapterConfig, LoraConfig, check_has_none
from ddpo.weights.export import loads_lora
from ddpo.weights.formats import LowRank, merge

_NAME = "beginning"
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def begins_with(pipeline: DiffusionPipeline, adapter: AdapterConfig | None) -> dict[str, LowRank]:
    """What the trained adapter begins with, by layer; nothing where it begins with no change.

    With `reference: start` the LoRA becomes part of the pipeline's weights, and nothing is left to begin with.

    Args:
        pipeline: At its pretrained weights, before it is taken over.
        adapter: What will be trained.

    Raises:
        FieldError: The LoRA cannot be read, or does not fit.
        UserError: The network has an adapter already.
    """
    if not isinstance(adapter, LoraConfig) or adapter.init is None:
        return {}
    layers = read_lora(pipeline, adapter.init)
    if adapter.reference == "base":
        return layers
    network = find_network(pipeline)
    if is_quantized(network):
        raise FieldError("adapter.reference", "start", "base with quantised weights, to which nothing can be added")
    merge(network, layers)
    return {}


def read_lora(pipeline: DiffusionPipeline, place: str) -> dict[str, LowRank]:
    """The updates of a LoRA of the denoiser by layer, with their scales, in the network's number format.

    Args:
        pipeline: That it was made for; as it was afterwards.
        place: A folder, a safetensors file, or a hub id.

    Raises:
        FieldError: It cannot be read, has parts for a text encoder, or none for the denoiser.
        UserError: The network has an adapter already.
    """
    name, network = find_denoiser(pipeline), find_network(pipeline)
    check_has_none(network, name)
    if isinstance(network, Experts) or not loads_lora(pipeline, name):
        raise FieldError("adapter.init", place, f"null: {type(pipeline).__name__} reads no LoRA for a single network")
    found = str(Path(place).expanduser()) if Path(place).expanduser().exists() else place
    _refuse_text_encoders(pipeline, found, name)
    try:
        pipeline.load_lora_weights(found, adapter_name=_NAME, use_safetensors=True)
    except _UNREADABLE as error:
        with suppress(ValueError):
            pipeline.unload_lora_weights()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FieldError("adapter.init", place, f"a LoRA of this model, but diffusers says: {reason}") from error
    layers = _layers(network)
    pipeline.unload_lora_weights()
    if not layers:
        raise FieldError("adapter.init", place, f"a LoRA with layers of the {name}")
    return layers


def _refuse_text_encoders(pipeline: DiffusionPipeline, place: str, name: str) -> None:
    """Only the denoiser is a policy: with another text encoder, the pretrained model would be another one.

    Raises:
        FieldError: There are keys of a text encoder, or the file cannot be read.
    """
    settings = {"unet_config": pipeline.components[name].config} if name == "unet" else {}
    try:
        read = pipeline.lora_state_dict(place, use_safetensors=True, **settings)
    except _UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FieldError("adapter.init", place, f"a LoRA in safetensors, but diffusers says: {reason}") from error
    state: Mapping[str, object] = read[0] if isinstance(read, tuple) else read
    encoders = sorted({key.partition(".")[0] for key in state if key.startswith("text_encoder")})
    if encoders:
        raise FieldError(
            "adapter.init", place,
            f"a LoRA of the {name} alone; this one also changes {', '.join(encoders)}, which is not trained and not "
            "part of the KL: fuse it into the pipeline, save that, and name its folder in model.path",
        )  # fmt: skip


def _layers(network: nn.Module) -> dict[str, LowRank]:
    """The loaded adapter's updates."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and _NAME in layer.lora_A:
            down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
            found[name] = LowRank(down=down.detach().clone(), up=up.detach() * layer.scaling[_NAME])
    return found


@torch.no_grad()
def begin_at(network: nn.Module, adapter: LoraConfig, layers: Mapping[str, LowRank]) -> None:
    """Gives a fresh adapter the values of a LoRA of at most its rank; what is left of its rank changes nothing yet.

    Args:
        network: With its adapter.
        adapter: Its configuration.
        layers: From `begins_with`.

    Raises:
        FieldError: The LoRA has more rank than the adapter, or layers that it lacks.
    """
    for name, layer in layers.items():
        trained = network.get_submodule(name)
        factors = getattr(trained, "lora_A", {}), getattr(trained, "lora_B", {})
        if ADAPTER not in factors[0]:
            targets = None if adapter.target_modules is None else list(adapter.target_modules)
            raise FieldError("adapter.target_modules", targets, f"a list that has the layers of adapter.init ({name})")
        rank = layer.down.shape[0]
        if rank > adapter.rank:
            raise FieldError("adapter.rank", adapter.rank, f"at least {rank}, that of adapter.init")
        down, up = (factor[ADAPTER].weight for factor in factors)
        down[:rank] = layer.down
        up[:, :rank] = layer.up / adapter.scale
