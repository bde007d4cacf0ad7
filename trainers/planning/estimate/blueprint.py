"""A pipeline's networks on torch's meta device: all shapes, no data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn

from ddpo.loading import SHAPES
from trainers.config.errors import ConfigError
from trainers.planning.architectures import ARCHITECTURES, INDEX, Architecture, denoiser_of, read_classes

Inputs = dict[str, Tensor | dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Sizes of a sample.

    Attributes:
        shape: Of the denoiser's latents, without the batch.
        vae_shape: Of what the VAE decodes; None in pixel space.
        text_tokens: Embeddings of a prompt.
    """

    shape: tuple[int, ...]
    vae_shape: tuple[int, ...] | None
    text_tokens: int

    @property
    def numel(self) -> int:
        """Latent dimensions D."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, kw_only=True)
class Family:
    """How denoisers of a class are called.

    Attributes:
        build: The class.
        latents: From a denoiser, the latent height and width and the number of prompt tokens, the sizes of a sample.
        inputs: From a denoiser, its sample sizes, rows and precision, the arguments of a call.
    """

    build: type[ModelMixin]
    latents: Callable[[ModelMixin, int, int], Latents]
    inputs: Callable[[ModelMixin, Latents, int, torch.dtype], Inputs]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def _unet_latents(denoiser: ModelMixin, height: int, width: int) -> Latents:
    shape = (denoiser.config["in_channels"], height, width)
    return Latents(shape=shape, vae_shape=shape, text_tokens=77)


def _unet_inputs(denoiser: ModelMixin, latents: Latents, rows: int, dtype: torch.dtype) -> Inputs:
    config = denoiser.config
    inputs: Inputs = {
        "sample": _empty(rows, *latents.shape, dtype=dtype),
        "timestep": _empty(rows, dtype=torch.int64),
        "encoder_hidden_states": _empty(rows, latents.text_tokens, config["cross_attention_dim"], dtype=dtype),
    }
    if config["addition_embed_type"] == "text_time":
        sizes = 6 * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - sizes
        inputs["added_cond_kwargs"] = {
            "text_embeds": _empty(rows, pooled, dtype=dtype),
            "time_ids": _empty(rows, 6, dtype=dtype),
        }
    return inputs


def _sd3_latents(denoiser: ModelMixin, height: int, width: int) -> Latents:
    shape = (denoiser.config["in_channels"], height, width)
    return Latents(shape=shape, vae_shape=shape, text_tokens=77 + 256)


def _sd3_inputs(denoiser: ModelMixin, latents: Latents, rows: int, dtype: torch.dtype) -> Inputs:
    config = denoiser.config
    return {
        "hidden_states": _empty(rows, *latents.shape, dtype=dtype),
        "timestep": _empty(rows),
        "encoder_hidden_states": _empty(rows, latents.text_tokens, config["joint_attention_dim"], dtype=dtype),
        "pooled_projections": _empty(rows, config["pooled_projection_dim"], dtype=dtype),
    }


def _flux_latents(denoiser: ModelMixin, height: int, width: int) -> Latents:
    channels = denoiser.config["in_channels"]  # of 2 x 2 patches
    shape = (height * width // 4, channels)
    return Latents(shape=shape, vae_shape=(channels // 4, height, width), text_tokens=512)


def _flux_inputs(denoiser: ModelMixin, latents: Latents, rows: int, dtype: torch.dtype) -> Inputs:
    config = denoiser.config
    inputs: Inputs = {
        "hidden_states": _empty(rows, *latents.shape, dtype=dtype),
        "timestep": _empty(rows, dtype=dtype),
        "encoder_hidden_states": _empty(rows, latents.text_tokens, config["joint_attention_dim"], dtype=dtype),
        "pooled_projections": _empty(rows, config["pooled_projection_dim"], dtype=dtype),
        "img_ids": _empty(latents.shape[0], 3, dtype=dtype),
        "txt_ids": _empty(latents.text_tokens, 3, dtype=dtype),
    }
    return {**inputs, "guidance": _empty(rows)} if config["guidance_embeds"] else inputs


FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(build=diffusers.UNet2DConditionModel, latents=_unet_latents, inputs=_unet_inputs),
    "SD3Transformer2DModel": Family(build=diffusers.SD3Transformer2DModel, latents=_sd3_latents, inputs=_sd3_inputs),
    "FluxTransformer2DModel": Family(
        build=diffusers.FluxTransformer2DModel, latents=_flux_latents, inputs=_flux_inputs
    ),
}
_ENCODERS: dict[str, tuple[type[transformers.PreTrainedModel], type[transformers.PretrainedConfig]]] = {
    "CLIPTextModel": (transformers.CLIPTextModel, transformers.CLIPTextConfig),
    "CLIPTextModelWithProjection": (transformers.CLIPTextModelWithProjection, transformers.CLIPTextConfig),
    "T5EncoderModel": (transformers.T5EncoderModel, transformers.T5Config),
}


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A pipeline without data.

    Attributes:
        denoiser: On the meta device, float32.
        family: How it is called.
        vae: On the meta device; None in pixel space.
        encoder_parameters: Of all text encoders.
    """

    denoiser: ModelMixin
    family: Family
    vae: AutoencoderKL | None
    encoder_parameters: int

    def latents(self, height: int | None, width: int | None) -> Latents:
        """Sizes of a sample.

        Args:
            height: In pixels; None for the pipeline's own.
            width: The same.
        """
        scale = 1 if self.vae is None else 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        own = self.denoiser.config.get("sample_size", 128)  # FLUX's pipelines hold it, not its configuration
        rows, columns = (own if pixels is None else pixels // scale for pixels in (height, width))
        return self.family.latents(self.denoiser, rows, columns)


def read_blueprint(path: str) -> Blueprint:
    """The networks of a pipeline folder, from its configuration files alone, or of a published pipeline.

    Args:
        path: `model.path`: a folder, `shapes`, or the id of one of `ARCHITECTURES`.

    Raises:
        ConfigError: Neither, or of a class that has no family here.
    """
    folder = SHAPES if path == "shapes" else Path(path).expanduser()
    if (folder / INDEX).is_file():
        return _from_folder(folder)
    if path not in ARCHITECTURES:
        raise ConfigError(
            f"memory cannot be estimated for model.path {path!r} without its configuration files: give a local folder, "
            f"or one of {', '.join(ARCHITECTURES)}"
        )
    return build(ARCHITECTURES[path])


def build(architecture: Architecture) -> Blueprint:
    """The networks of an architecture."""
    family = _family(architecture.denoiser_class)
    with torch.device("meta"):
        denoiser = family.build(**architecture.denoiser)
        vae = None if architecture.vae is None else AutoencoderKL(**architecture.vae)
    return Blueprint(denoiser=denoiser, family=family, vae=vae, encoder_parameters=architecture.encoder_parameters)


def _from_folder(folder: Path) -> Blueprint:
    classes = read_classes(folder)
    name, kind = denoiser_of(classes)
    if not name:
        raise ConfigError(f"model.path: {folder} has no unet and no transformer")
    family = _family(kind)
    autoencoder = classes.get("vae")
    if autoencoder not in (None, "AutoencoderKL"):
        raise ConfigError(f"memory cannot be estimated for a {autoencoder}; only for AutoencoderKL")
    with torch.device("meta"):
        denoiser = family.build.from_config(family.build.load_config(folder, subfolder=name))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae")) if autoencoder else None
    encoders = [(part, kind) for part, kind in classes.items() if part.startswith("text_encoder")]
    counts = [_count_encoder(folder / part, kind) for part, kind in encoders]
    return Blueprint(denoiser=denoiser, family=family, vae=vae, encoder_parameters=sum(counts))


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"memory cannot be estimated for a {name}; only for {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _count_encoder(folder: Path, kind: str) -> int:
    if kind not in _ENCODERS:
        raise ConfigError(f"memory cannot be estimated for a {kind}; only for {', '.join(_ENCODERS)}")
    model, config = _ENCODERS[kind]
    with torch.device("meta"):
        encoder: nn.Module = model(config.from_pretrained(folder))
    return sum(parameter.numel() for parameter in encoder.parameters())
