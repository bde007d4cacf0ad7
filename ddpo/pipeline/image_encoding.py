"""From images to the latents that the sampler would end at, by the pipeline's own VAE.

What a pipeline does between its last latents x and its VAE's input z is undone: it moves entries (packing), scales and
shifts them. Which it does is found, not looked up: the pipeline's own tail is run on probes, with the VAE's decoder
replaced by one that only shows its input.

    z_j = scale_j x_source(j) + shift_j     source by probes that spell out each entry's index in digits

The arithmetic is that of image-to-image pipelines where it fits, with the numbers of the VAE's configuration,
x = (z - shift) scaling / std, so that the latents are theirs to the last bit; else the measured scales are divided out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ddpo.pipeline.decoding import Decoder
from ddpo.pipeline.offload import Offload
from ddpo.pipeline.tracing import UntraceableError, replaced
from ddpo.validation import UserError

BASE = 16  # of the digits that spell out an index: small enough to survive 8 bits of precision
TOLERANCE = 1e-4  # relative, of undoing the tail


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a VAE's latents stand in the sampler's.

    Attributes:
        source: Entry of x, flattened, that each entry of z comes from, in the order of z, int64.
        shape: Of one sample's z.
        undo: Takes z, (B, *shape) float32, to the same entries with the sampler's scale and shift.
    """

    source: Tensor
    shape: tuple[int, ...]
    undo: Callable[[Tensor], Tensor]

    def pack(self, z: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """The sampler's latents, (B, *latent), of the VAE's, (B, *shape)."""
        flat = self.undo(z).flatten(1)
        packed = torch.empty_like(flat)
        packed[:, self.source] = flat
        return packed.reshape(-1, *latent_shape)


class _Shown(Exception):
    """Ends a tail once its VAE's input is known."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z


def _check_images(images: Tensor) -> None:
    """Refuses what are no images as rewards are given them."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise UserError(f"images must be floats of shape (B, 3, H, W) in [0, 1], got {kind} {tuple(images.shape)}")
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise UserError(f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}")


class ImageEncoder:
    """Encodes images by a pipeline."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        decoder: Decoder,
        *,
        latent_shape: tuple[int, ...],
        device: torch.device,
        offload: Offload,
    ) -> None:
        """Takes a pipeline; what its tail does is found when it is first needed.

        Args:
            pipeline: The stock pipeline.
            decoder: Runs its tail.
            latent_shape: Shape of one sample's latents.
            device: Where it runs.
            offload: Brings the VAE to the device.
        """
        self._pipeline = pipeline
        self._decoder = decoder
        self._latent_shape = latent_shape
        self._device = device
        self._offload = offload

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Latents of images; see `ddpo.Policy.encode_images`."""
        _check_images(images)
        images = images.to(self._device, torch.float32)
        vae = self._pipeline.components.get("vae")
        if vae is None:
            return self._as_latents(images)
        layout = self._layout
        if len(layout.shape) == 4 and layout.shape[1] > 1:
            raise UserError(f"{self._name} makes videos of {layout.shape[1]} latent frames, and an image is none")
        pixels = 2.0 * images - 1.0
        pixels = pixels[:, :, None] if len(layout.shape) == 4 else pixels
        with self._offload.auxiliaries(), _in_float32(vae, needed=vae.config.get("force_upcast", False)):
            z = _mean(vae.encode(pixels.to(vae.dtype), return_dict=False)[0], self._name).float()
        if z.shape[1:] != layout.shape:
            raise UserError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels become latents of shape {tuple(z.shape[1:])}, "
                f"but {self._name} decodes {layout.shape}; give images of the size of the policy's pictures"
            )
        return layout.pack(z, self._latent_shape)

    @property
    def _name(self) -> str:
        return type(self._pipeline).__name__

    def _as_latents(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], of a pipeline whose latents they are."""
        latents = 2.0 * images - 1.0
        if latents.shape[1:] != self._latent_shape or not torch.allclose(self._decoder(latents), images, atol=1e-3):
            raise UntraceableError(
                f"{self._name} has no component vae, and its latents of shape {self._latent_shape} are not the "
                f"images themselves, {tuple(images.shape[1:])} in [-1, 1]: images cannot be encoded"
            )
        return latents

    @cached_property
    def _layout(self) -> Layout:
        vae = self._pipeline.vae
        with torch.no_grad(), self._offload.auxiliaries(), _in_float32(vae, needed=True):
            count = math.prod(self._latent_shape)
            shift = self._shown(torch.zeros(count))
            scale = self._shown(torch.ones(count)) - shift
            source = torch.zeros_like(shift, dtype=torch.int64)
            for digit in range(math.ceil(math.log(count, BASE)) if count > 1 else 1):
                spelled = torch.arange(count) // BASE**digit % BASE
                source += ((self._shown(spelled.float()) - shift) / scale).round().long() * BASE**digit
            if not torch.equal(source.flatten().sort().values, torch.arange(count, device=source.device)):
                raise UntraceableError(
                    f"{self._name} does not hand each entry of its latents to the VAE once, scaled and shifted: images "
                    "cannot be encoded"
                )
            return self._checked(source, scale, shift)

    def _checked(self, source: Tensor, scale: Tensor, shift: Tensor) -> Layout:
        """The layout whose arithmetic undoes the tail of a random z: by configuration, or else as measured."""
        probe = torch.randn(1, *shift.shape, generator=torch.Generator().manual_seed(0)).to(self._device)
        for undo in (_by_configuration(self._pipeline.vae), lambda z: (z - shift) / scale):
            layout = Layout(source=source.flatten(), shape=tuple(shift.shape), undo=undo)
            again = self._shown(layout.pack(probe, self._latent_shape))
            if (again - probe[0]).abs().max() <= TOLERANCE * probe.abs().max():
                return layout
        raise UntraceableError(
            f"{self._name} does more to its latents before its VAE than to move, scale and shift their entries: images "
            "cannot be encoded"
        )

    def _shown(self, x: Tensor) -> Tensor:
        """What the tail hands to the VAE for one sample's latents."""

        def decode(z: Tensor, *arguments: object, **options: object) -> object:
            raise _Shown(z)

        with replaced(self._pipeline.vae, "decode", decode):
            try:
                self._decoder.frames(x.reshape(1, *self._latent_shape).to(self._device))
            except _Shown as shown:
                return shown.z[0].float()
        raise UntraceableError(f"{self._name} decodes without its component vae: images cannot be encoded")


def _by_configuration(vae: ModelMixin) -> Callable[[Tensor], Tensor]:
    """(z - shift) scaling / std, with what a VAE's configuration holds of these."""
    config, std = vae.config, vae.config.get("latents_std")
    shift = config.get("latents_mean") if std is not None else config.get("shift_factor")
    scaling = config.get("scaling_factor")

    def undo(z: Tensor) -> Tensor:
        def channels(value: float | list[float]) -> Tensor:
            return torch.as_tensor(value, dtype=z.dtype, device=z.device).reshape(1, -1, *[1] * (z.ndim - 2))

        z = z if shift is None else z - channels(shift)
        z = z if scaling is None else z * scaling
        return z if std is None else z / channels(std)

    return undo


def _mean(encoded: object, name: str) -> Tensor:
    """The mean of a VAE's posterior, or what one without a posterior returns."""
    if isinstance(encoded, DiagonalGaussianDistribution):
        return encoded.mode()
    if isinstance(encoded, Tensor):
        return encoded
    raise UntraceableError(f"the VAE of {name} encodes to {type(encoded).__name__}, of which no mean is known")


@contextmanager
def _in_float32(vae: ModelMixin, *, needed: bool) -> Iterator[None]:
    """A VAE in float32 where it is needed, for the time of a `with` block; exactly as it was afterwards."""
    dtype = vae.dtype
    if needed and dtype != torch.float32:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if vae.dtype != dtype:
            vae.to(dtype)
