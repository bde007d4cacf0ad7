"""What is trained: a LoRA adapter by peft, or every weight; and how to step back to the pretrained model.

LoRA (Hu et al., arXiv:2106.09685) adds (alpha / rank) B @ A to chosen layers. Switching it off gives the pretrained
model from the same weights, so a reference for the KL costs no second copy. Adapter weights are float32 whatever the
base.
"""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpo.validation import check

if TYPE_CHECKING:  # peft and diffusers take seconds to import, and the configurations here need neither
    from diffusers import DiffusionPipeline, ModelMixin

ADAPTER = "default"
PEFT_PREFIX, PEFT_FILE = "base_model.model", "adapter_model.safetensors"
ATTENTION_PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train a low-rank adapter (Hu et al., arXiv:2106.09685); the pretrained weights stay as they are.

    Attributes:
        rank: Rank r of each update B @ A.
        alpha: Scale; the update is (alpha / rank) B @ A. null takes `rank`, i.e. a scale of 1.
        target_modules: Suffixes of the linear or convolution layers to adapt; null takes the attention projections.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check(self.rank >= 1, "rank", self.rank, "at least 1")
        check(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "positive or null")


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Train every weight of the denoiser in float32; the pretrained ones are kept as a second copy for the KL."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["full"] = "full"


AdapterConfig = LoraConfig | FullConfig


def check_has_none(denoiser: nn.Module, name: str) -> None:
    """Refuses a network that has an adapter already.

    Switching the trained adapter off, which gives the pretrained model, would switch that one off as well.

    Args:
        denoiser: The network.
        name: Its component name in the pipeline.

    Raises:
        ValueError: It has one; the message says how to make it part of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(layer, BaseTunerLayer) for layer in denoiser.modules()):
        raise ValueError(
            f"the pipeline's {name} already has an adapter; make it part of the weights first, by "
            "`pipeline.fuse_lora(); pipeline.unload_lora_weights()`, or, if another Policy added it, give each a "
            "pipeline of its own (Policy.with_sampler samples the same weights otherwise)"
        )


def attach(denoiser: nn.Module, config: AdapterConfig, *, seed: int = 0) -> None:
    """Makes the configured weights of `denoiser` trainable, in float32, and freezes the rest.

    Args:
        denoiser: The pretrained network; changed in place.
        config: LoRA or full fine-tuning.
        seed: Of the adapter's random initialisation (A; B starts at 0, so the model is unchanged).

    Raises:
        ValueError: An entry of `target_modules` matches no layer.
    """
    import peft

    if isinstance(config, FullConfig):
        denoiser.float().requires_grad_(True)
        return
    denoiser.requires_grad_(False)
    targets = config.target_modules or default_targets(denoiser)
    names = [name for name, layer in denoiser.named_modules() if _adaptable(layer)]
    missing = [target for target in targets if not any(name == target or name.endswith("." + target) for name in names)]
    if missing:
        raise ValueError(
            f"adapter.target_modules {missing} match no layer of {type(denoiser).__name__}; "
            f"its adaptable layers are called {', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
        peft.inject_adapter_in_model(settings, denoiser, adapter_name=ADAPTER)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def default_targets(denoiser: nn.Module) -> tuple[str, ...]:
    """The attention projections that this denoiser has, as suffixes of layer names."""
    names = [name for name, layer in denoiser.named_modules() if _adaptable(layer)]
    found = tuple(suffix for suffix in ATTENTION_PROJECTIONS if any(name.endswith("." + suffix) for name in names))
    if not found:
        raise ValueError(
            f"{type(denoiser).__name__} has no attention projections ({', '.join(ATTENTION_PROJECTIONS)}); "
            "name the layers to adapt in adapter.target_modules"
        )
    return found


@contextmanager
def adapter_off(denoiser: nn.Module) -> Iterator[None]:
    """The pretrained network, for the time of a `with` block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = (layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer))
    layers = [layer for layer in adapted if not layer.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def frozen_copy(denoiser: nn.Module) -> nn.Module:
    """A second copy of the pretrained weights in float32, as they are trained (`attach`), for full fine-tuning.

    In a lower precision what runs outside autocast, such as embeddings and modulations, would differ from the trained
    network, and the KL would not start at 0.
    """
    return copy.deepcopy(denoiser).float().requires_grad_(False).eval()


def lora_state(denoiser: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights in peft's naming with the scale alpha / rank baked into B.

    Most tools read a LoRA without its metadata as alpha = rank; with the scale in the weights that is right.

    Args:
        denoiser: The network with its adapter.
        weights: The adapter's weights by the parameters' names.
    """
    import peft

    settings: peft.LoraConfig = vars(denoiser)["peft_config"][ADAPTER]
    scale = settings.lora_alpha / settings.r
    state = peft.get_peft_model_state_dict(denoiser, state_dict=dict(weights), adapter_name=ADAPTER)
    return {
        name: (value * scale if ".lora_B." in name else value).detach().cpu().contiguous()
        for name, value in state.items()
    }


def save_weights(
    pipeline: "DiffusionPipeline", name: str, denoiser: "ModelMixin", folder: Path, weights: Mapping[str, Tensor]
) -> None:
    """Writes what was trained in diffusers' own format.

    A LoRA goes to `folder` itself, for `pipeline.load_lora_weights(folder)`, or, for a pipeline without that function
    (PixArt, DDPM), for `peft.PeftModel.from_pretrained(pipeline.<name>, folder)`. Fully trained weights go to
    `folder/<name>`, for `from_pretrained(folder, subfolder=name)`.

    Args:
        pipeline: The pipeline that the denoiser belongs to.
        name: Its component name, `unet` or `transformer`.
        denoiser: The trained network; its own weights may be split over processes, and are not read.
        folder: Where to write; made if missing.
        weights: The trained weights by the parameters' names, whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(denoiser, "peft_config"):
        layers = {f"{name}_lora_layers": lora_state(denoiser, weights)}
        if hasattr(pipeline, "save_lora_weights"):
            pipeline.save_lora_weights(str(folder), **layers, safe_serialization=True)
        else:
            _save_as_peft(denoiser, folder, weights)
    else:
        _save_whole(pipeline, name, denoiser, folder / name, weights)


def read_weights(
    pipeline: "DiffusionPipeline", name: str, denoiser: "ModelMixin", folder: Path, parameters: Collection[str]
) -> dict[str, Tensor]:
    """What `save_weights` wrote, by the parameters' names, on the CPU.

    Args:
        pipeline: As for `save_weights`.
        name: As for `save_weights`.
        denoiser: As for `save_weights`.
        folder: Where it was written.
        parameters: Names of the trained weights.

    Raises:
        ValueError: The folder holds other weights.
    """
    from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

    scale = 1.0
    if not hasattr(denoiser, "peft_config"):
        file, keys = folder / name / SAFETENSORS_WEIGHTS_NAME, {key: key for key in parameters}
    else:
        is_peft = not hasattr(pipeline, "save_lora_weights")
        prefix = PEFT_PREFIX if is_peft else name
        file = folder / (PEFT_FILE if is_peft else "pytorch_lora_weights.safetensors")
        keys = {key: f"{prefix}.{key.replace(f'.{ADAPTER}.', '.')}" for key in parameters}
        settings = vars(denoiser)["peft_config"][ADAPTER]
        scale = settings.lora_alpha / settings.r
    saved = load_file(file)
    missing = [key for key in keys.values() if key not in saved]
    if missing:
        raise ValueError(f"{file} holds other weights than this policy trains: {missing[0]} is missing")
    return {key: saved[stored] / (scale if ".lora_B." in key else 1.0) for key, stored in keys.items()}


def _save_whole(
    pipeline: "DiffusionPipeline", name: str, denoiser: "ModelMixin", folder: Path, weights: Mapping[str, Tensor]
) -> None:
    """Configuration and weights as `save_pretrained` writes them, in one file, under the class that was loaded."""
    from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

    folder.mkdir(parents=True, exist_ok=True)
    _, class_name = pipeline.config[name]  # splitting a network over processes derives a class from its own
    settings = {**json.loads(denoiser.to_json_string()), "_class_name": class_name}
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    parameters = {key for key, _ in denoiser.named_parameters()}
    buffers = {key: value for key, value in denoiser.state_dict().items() if key not in parameters}
    state = {key: value.detach().cpu().contiguous() for key, value in {**buffers, **weights}.items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _save_as_peft(denoiser: "ModelMixin", folder: Path, weights: Mapping[str, Tensor]) -> None:
    settings = copy.copy(vars(denoiser)["peft_config"][ADAPTER])
    settings.lora_alpha = settings.r  # the scale is in the weights
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    state = {f"{PEFT_PREFIX}.{name}": value for name, value in lora_state(denoiser, weights).items()}
    save_file(state, folder / PEFT_FILE)


def _adaptable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)
