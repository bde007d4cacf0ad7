"""What a pipeline does after its loop, looked at once: rewards are given pictures in [0, 1] and nothing else.

One latent is decoded when a policy is made, then once more under another prompt, other input images and other chance:
the tail must make the same of it, since a policy decodes latents without what they were made from. A VAE that decodes
in tiles alone is told to; what decodes no two latents at a time is found.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import Tensor

from ddpo.pipeline.call import BLANK
from ddpo.pipeline.decoding import Decoder
from ddpo.pipeline.tracing import UntraceableError, first_line

_LOG = logging.getLogger(__name__)
PROMPT, COLOR = "a b c", "white"
ONE_SHADE = 1 / 255


def check_tail(decoder: Decoder, latent_shape: tuple[int, ...], *, device: torch.device) -> bool:
    """Refuses a pipeline whose pictures are not what rewards take, or depend on more than the final latents.

    The VAE is switched to tiles where it can decode in no other way.

    Args:
        decoder: Of the pipeline.
        latent_shape: Shape of one sample's latents.
        device: Where it runs.

    Returns:
        Whether it decodes several latents at a time.

    Raises:
        UntraceableError: What is wrong with its pictures.
    """
    name = type(decoder.pipeline).__name__
    two = torch.randn(2, *latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    devices = [device] if device.type == "cuda" else []

    latents = two[:1]

    def decoded(prompt: str, color: str, seed: int, latents: Tensor = latents) -> Tensor:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                return decoder.seeing(prompt, color).frames(latents)
        except Exception as error:  # whatever the tail raises, it does not take these latents
            raise UntraceableError(
                f"{name} fails to make a picture of its latents: {type(error).__name__}: {first_line(error)}"
            ) from error

    with _in_tiles(decoder.pipeline):
        plain = decoded(BLANK, "black", 0)
        _check_picture(plain, name)
        is_same, several = _alike(plain, decoded(PROMPT, COLOR, 1)), True
        try:
            decoded(BLANK, "black", 0, two)
        except UntraceableError:  # HunyuanVideo 1.5's VAE
            several = False
    if is_same:
        _tile_if_needed(decoder, latents)
        return several
    with _in_tiles(decoder.pipeline):
        if not _alike(plain, decoded(BLANK, "black", 1)):
            raise UntraceableError(f"{name} draws at random while it makes a picture of its final latents")
        seen = "input image" if _alike(plain, decoded(PROMPT, "black", 0)) else "prompt"
    raise UntraceableError(
        f"{name} makes its pictures of the {seen} besides the final latents, and a policy decodes the latents alone"
    )


def _check_picture(images: object, name: str) -> None:
    shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.ndim not in (4, 5) or images.shape[0] != 1 or images.shape[-3] != 3:
        raise UntraceableError(f"{name} makes {shape} of one latent where a picture is (1, 3, H, W), a video "
                               "(1, F, 3, H, W): rewards take RGB pictures")  # fmt: skip
    if (images < 0).any() or (images > 1).any():
        raise UntraceableError(
            f"{name} makes pictures with values from {float(images.min()):.3g} to {float(images.max()):.3g} for "
            "output_type pt, and rewards take pictures in [0, 1]"
        )


def _alike(images: Tensor, others: Tensor) -> bool:
    return images.shape == others.shape and float((images - others).abs().max()) < ONE_SHADE


class _DecodesError(Exception):
    """The VAE has come to its layers."""


def _tile_if_needed(decoder: Decoder, latents: Tensor) -> None:
    """Switches the VAE to tiles if it refuses to decode without, which is seen before its first layer runs."""
    vae = decoder.pipeline.components.get("vae")
    if not isinstance(vae, AutoencoderMixin) or getattr(vae, "use_tiling", True):
        return

    def stop(*_: object) -> None:
        raise _DecodesError

    autoencoder = cast(Any, vae)
    dtype = autoencoder.dtype
    with ExitStack() as stack, torch.no_grad():
        for layer in autoencoder.children():
            stack.callback(layer.register_forward_pre_hook(stop).remove)
        try:
            decoder.frames(latents)
        except _DecodesError:
            if autoencoder.dtype != dtype:  # pipelines decode some half-precision VAEs in float32
                autoencoder.to(dtype)
        except NotImplementedError:
            autoencoder.enable_tiling()
            _LOG.warning("%s decodes in tiles alone; it is set to do so", type(vae).__name__)


@contextmanager
def _in_tiles(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The VAE decodes large pictures in tiles, if it can: memory options are set only once a policy is there."""
    vae = pipeline.components.get("vae")
    if not isinstance(vae, AutoencoderMixin) or getattr(vae, "use_tiling", True):
        yield
        return
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.disable_tiling()
