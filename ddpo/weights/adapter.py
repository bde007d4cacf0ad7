"""What is trained: a LoRA adapter by peft, or every weight; and how to step back to the pretrained model.

LoRA (Hu et al., arXiv:2106.09685) adds (alpha / rank) B @ A to chosen layers. Switching it off gives the pretrained
model from the same weights, so a reference for the KL costs no second copy. Adapter weights are float32 whatever the
base.
"""

import copy
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ddpo.validation import FieldError, UserError, check

_LOG = logging.getLogger(__name__)

ADAPTER = "default"
MAX_RANK = 1 << 14  # beyond the width of any layer: nothing would be low about it
MAX_SCALE = 1000.0  # the first update would already drown the pretrained weights
ATTENTION_PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train a low-rank adapter (Hu et al., arXiv:2106.09685); the pretrained weights stay as they are.

    Attributes:
        rank: Rank r of each update B @ A.
        alpha: Scale; the update is (alpha / rank) B @ A. null takes `rank`, i.e. a scale of 1.
        target_modules: Suffixes of the linear or convolution layers to adapt; null takes the attention projections,
            by diffusers' usual names, or where none has one, the linear layers of all attention modules.
        init: A LoRA to begin from: a folder, a safetensors file or a hub id; null begins with no change.
        reference: With `init`, what the KL is to. `base`: the pretrained model; the LoRA is trained on. `start`: the
            model with the LoRA, which becomes part of the frozen weights; a new one is trained on top of it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    init: str | None = None
    reference: Literal["base", "start"] = "base"

    def __post_init__(self) -> None:
        check(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"at least 1, at most {MAX_RANK:,}")
        check(self.init is None or bool(self.init.strip()), "init", self.init, "a folder, a file, a hub id, or null")
        alone = self.init is None and self.reference != "base"
        check(not alone, "reference", self.reference, "base without adapter.init (there is no LoRA to start from)")
        fits = self.alpha is None or 0 < self.alpha <= MAX_SCALE * self.rank
        check(fits, "alpha", self.alpha, f"positive and at most {MAX_SCALE:g} times the rank, or null")

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by, alpha / rank."""
        return (self.alpha or self.rank) / self.rank


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
        UserError: It has one; the message says how to make it part of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(layer, BaseTunerLayer) for layer in denoiser.modules()):
        raise UserError(
            f"the pipeline's {name} already has an adapter; make it part of the weights first, by "
            "`pipeline.fuse_lora(); pipeline.unload_lora_weights()`, or, if another Policy added it, give each a "
            "pipeline of its own (Policy.with_sampler samples the same weights otherwise)"
        )


def attach(denoiser: nn.Module, config: AdapterConfig, *, used: Collection[str] | None = None, seed: int = 0) -> None:
    """Makes the configured weights of `denoiser` trainable, in float32, and freezes the rest.

    Args:
        denoiser: The pretrained network; changed in place.
        config: LoRA or full fine-tuning.
        used: Names of the modules that a forward pass calls; other layers get no adapter. None for all.
        seed: Of the adapter's random initialisation (A; B starts at 0, so the model is unchanged).

    Raises:
        UserError: An entry of `target_modules` matches no layer, or only layers that are not used.
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
        adaptable = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        raise FieldError(
            "adapter.target_modules", missing, f"among the adaptable layers of {type(denoiser).__name__} ({adaptable})"
        )
    idle = [] if used is None else _idle(denoiser, targets, names, used)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            target_modules=list(targets),
            exclude_modules=idle or None,
            init_lora_weights="gaussian",
        )
        peft.inject_adapter_in_model(settings, denoiser, adapter_name=ADAPTER)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _idle(denoiser: nn.Module, targets: Collection[str], names: Collection[str], used: Collection[str]) -> list[str]:
    """Names of the targeted layers that no forward pass calls; a line of the log says that they stay as they are.

    Raises:
        UserError: A target has no other layer.
    """
    unused = []
    idle: list[str] = []
    for target in targets:
        layers = [name for name in names if name == target or name.endswith("." + target)]
        waiting = [name for name in layers if name not in used]
        idle += waiting
        if len(waiting) == len(layers):
            unused.append(target)
    network = type(denoiser).__name__
    if unused:
        raise UserError(
            f"no forward pass of {network} calls its layers {', '.join(unused)}, and an adapter there would stay as it "
            "is: split fused projections by unfuse_qkv_projections() of the pipeline or of the network, or name other "
            "layers in adapter.target_modules"
        )
    if idle:
        _LOG.warning(
            "%d layers of %s get no adapter, since no forward pass calls them: %s",
            len(idle),
            network,
            ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else ""),
        )
    return idle


def default_targets(denoiser: nn.Module) -> tuple[str, ...]:
    """The attention projections that this denoiser has, as suffixes of layer names."""
    names = [name for name, layer in denoiser.named_modules() if _adaptable(layer)]
    usual = tuple(suffix for suffix in ATTENTION_PROJECTIONS if any(name.endswith("." + suffix) for name in names))
    found = usual or tuple(dict.fromkeys(_of_attention(denoiser)))
    if not found:
        raise UserError(
            f"{type(denoiser).__name__} has no attention projections ({', '.join(ATTENTION_PROJECTIONS)}) and no "
            "linear layers in attention modules; name the layers to adapt in adapter.target_modules"
        )
    return found


def _of_attention(denoiser: nn.Module) -> Iterator[str]:
    """Suffixes of the linear layers that attention modules hold, under whatever names, with those of their modules."""
    from diffusers.models.attention import AttentionModuleMixin

    for name, module in denoiser.named_modules():
        if isinstance(module, AttentionModuleMixin):
            own = name.rpartition(".")[2]
            yield from (f"{own}.{child}" for child, layer in module.named_children() if isinstance(layer, nn.Linear))


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


def pretrained_copy(denoiser: nn.Module) -> nn.Module:
    """A second copy of the pretrained weights in float32, as they are trained (`attach`), for full fine-tuning.

    In a lower precision what runs outside autocast, such as embeddings and modulations, would differ from the trained
    network, and the KL would not start at 0. So it would if these weights did not count as trainable: `torch.matmul`
    takes another kernel for an input that is not contiguous, which in bfloat16 rounds otherwise.
    """
    return copy.deepcopy(denoiser).float().requires_grad_(True).eval()


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """No gradients for a module's weights, for the time of a `with` block."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _adaptable(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)
