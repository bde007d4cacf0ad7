"""Pretrained weights in fewer bits, by diffusers' own quantisers; a LoRA is trained on top (QLoRA, arXiv:2305.14314).

Only the denoiser's linear layers are quantised. Each product is computed in the network's precision from weights that
are expanded for it, so that sampling and training see the same, slightly rounded, pretrained model.

    bnb_4bit        NormalFloat 4, blocks of 64 weights share a scale     bitsandbytes, CUDA
    bnb_8bit        LLM.int8 (arXiv:2208.07339)                           bitsandbytes, CUDA
    torchao_int8    8-bit integers, one scale an output                   torchao
    torchao_float8  8-bit floating point (e4m3), one scale an output      torchao
"""

import importlib.util
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from ddpo.validation import FieldError, MissingPackageError

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin

Quantization = Literal["bnb_4bit", "bnb_8bit", "torchao_int8", "torchao_float8"]


def check_quantization(kind: Quantization) -> None:
    """Refuses what cannot run here.

    Raises:
        MissingPackageError: The package is missing; the message names the extra.
        FieldError: bitsandbytes without a GPU.
    """
    package = "torchao" if kind.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(f"quantization {kind} needs {package}: pip install 'ddpo[{package}]'")
    if package == "bitsandbytes" and not torch.cuda.is_available():
        raise FieldError("quantization", kind, "torchao_int8, torchao_float8 or null without a CUDA GPU")


def quantization_config(kind: Quantization, *, dtype: torch.dtype) -> "PipelineQuantizationConfig":
    """What `DiffusionPipeline.from_pretrained(quantization_config=...)` is given.

    Args:
        kind: Format of the weights.
        dtype: Precision of the products.
    """
    from diffusers import PipelineQuantizationConfig

    check_quantization(kind)
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(("unet", "transformer"), _config(kind, dtype)))


def _config(kind: Quantization, dtype: torch.dtype) -> "QuantizationConfigMixin":
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    match kind:
        case "bnb_4bit":
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        case "bnb_8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        case "torchao_int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        case "torchao_float8":
            from torchao.quantization import Float8WeightOnlyConfig

            return TorchAoConfig(Float8WeightOnlyConfig())


def is_quantized(module: nn.Module) -> bool:
    """Whether a component of a pipeline was loaded with quantised weights, which cannot be cast or trained."""
    from diffusers import ModelMixin

    return isinstance(module, ModelMixin) and module.config.get("quantization_config") is not None
